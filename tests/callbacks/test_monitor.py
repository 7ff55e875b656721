import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, spearmanr
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, IterableDataset

from baselines.transmil import TransMIL
from mil_anchor import AnchorCallback, AttentionMonitor, AttentionSite, RandomState
from mil_anchor.callbacks.monitor import MEASURES, read_attention
from mil_anchor.callbacks.slow import SlowWeights
from mil_anchor.data.bags import Bag
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.module import MILModule
from tests.callbacks.tiny import (
    TinyModule,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

BLOCK = "net.attention"


class Watched(TinyModule):
    """Keeps the attention of its own validation passes."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.maps = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        scores = self.net.attention(self.net.encoder(batch["features"]))
        self.maps.append(torch.softmax(scores.double(), dim=1).transpose(1, 2))

    def loss(self, batch):
        # One call of the block per validation step: the one in validation_step.
        if self.training:
            return super().loss(batch)
        return self.net.head.weight.sum()


class Turning(IterableDataset):
    """Bags in another order in every epoch."""

    def __init__(self, module) -> None:
        self.module = module

    def __iter__(self):
        batches, epoch = make_batches(), self.module.current_epoch
        yield from batches[epoch:] + batches[:epoch]


def _naive_row(previous, current, labels):
    """The measures of one bag by other libraries; maps are (row, instance)."""

    def mean(values, rounding=1e-6):
        return pytest.approx(sum(values) / len(values), abs=rounding)

    moved, alike = None, None
    if previous is not None:
        pairs = list(zip(previous.numpy(), current.numpy(), strict=True))
        # The earlier attention was kept in float16.
        moved = mean([jensenshannon(*pair) ** 2 for pair in pairs], 5e-6)
        alike = mean([spearmanr(*pair).statistic for pair in pairs], 2e-4)
    highest = current.sort(dim=-1, descending=True).values
    known = labels >= 0
    both = len(set((labels[known] > 0).tolist())) == 2
    aurocs = [roc_auc_score(labels[known] > 0, row[known]) for row in current] if both else []
    return {
        "jsd": moved,
        "rank_correlation": alike,
        "entropy": mean([entropy(row) / math.log(len(row)) for row in current.numpy()]),
        "top1pct": mean([row[: math.ceil(len(row) / 100)].sum().item() for row in highest]),
        "top10": mean([row[:10].sum().item() for row in highest]),
        "auroc": mean(aurocs) if both else None,
        "mixing_correlation": None,
    }


def test_monitor__every_epoch_and_bag__writes_all_measures_as_defined(tmp_path):
    module = seeded_module(Watched)
    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK), max_epochs=3, num_sanity_val_steps=2)
    batches = make_batches(2, n_instances=130)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        batch["instance_label"] = torch.randint(-1, 3, (2, 130), generator=generator)
    batches[1]["instance_label"][1].clamp_(min=1)  # no negative instance

    trainer.fit(module, make_loader(batches), make_loader(batches))

    rows = read_attention(tmp_path / "attention.csv")
    maps = torch.stack(module.maps[2:]).unflatten(0, (3, 2)).flatten(1, 2)  # epoch, bag, row, n
    labels = torch.cat([batch["instance_label"] for batch in batches])
    assert [row.epoch for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row.bag_id for row in rows[:4]] == ["bag0_0", "bag0_1", "bag1_0", "bag1_1"]
    assert {row.weights for row in rows} == {"online"}
    for index, row in enumerate(rows):
        epoch, bag = divmod(index, 4)
        previous = maps[epoch - 1, bag] if epoch else None
        expected = _naive_row(previous, maps[epoch, bag], labels[bag])
        assert {name: getattr(row, name) for name in MEASURES} == expected
    assert [row.auroc is None for row in rows[:4]] == [False, False, False, True]
    logged = trainer.callback_metrics
    for name in MEASURES[:-1]:
        values = [getattr(row, name) for row in rows[8:] if getattr(row, name) is not None]
        mean = sum(values) / len(values)
        assert logged[f"attention/{name}"].item() == pytest.approx(mean, abs=1e-6)
    assert "attention/mixing_correlation" not in logged


def test_monitor__first_epoch_without_labels__logs_what_is_defined(tmp_path):
    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK), max_epochs=1)

    trainer.fit(seeded_module(), make_loader(), make_loader())

    logged = {name for name in trainer.callback_metrics if name.startswith("attention/")}
    assert logged == {"attention/entropy", "attention/top1pct", "attention/top10"}


def test_monitor__slow_weights__are_what_is_measured_and_named(tmp_path):
    trainer = make_trainer(tmp_path, SlowWeights(decay=0.0, warmup=False), AttentionMonitor(BLOCK))
    trainer.fit(seeded_module(), make_loader(), make_loader())

    assert {row.weights for row in read_attention(tmp_path / "attention.csv")} == {"slow"}


def test_monitor__beside_a_plugin__changes_nothing_in_training(tmp_path):
    trained = []
    for callbacks in ([], [AttentionMonitor(BLOCK)]):
        module = seeded_module()
        plugin = AnchorCallback(BLOCK, weight=0.5)
        make_trainer(tmp_path, plugin, *callbacks).fit(module, make_loader(), make_loader())
        trained.append(parameters_of(module))
        assert not module.net.attention._forward_hooks

    assert_equal_states(*trained)


@pytest.mark.parametrize(("max_bags", "n_bags"), [(None, 12), (5, 5)])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_monitor__stop_and_resume__writes_the_file_of_the_uninterrupted_run(
    tmp_path, max_bags, n_bags
):
    class Breaking(TinyModule):
        breaks = False

        def on_train_epoch_end(self):
            # After validation has written its rows, before the checkpoint of this epoch.
            if self.breaks and self.current_epoch == 2:
                raise KeyError("power cut")

    def fit(folder, *, breaks, ckpt_path=None):
        module = seeded_module(Breaking)
        module.breaks = breaks
        keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        trainer = make_trainer(
            folder,
            AttentionMonitor(BLOCK, max_bags=max_bags),
            RandomState(),
            keeper,
            max_epochs=4,
            enable_checkpointing=True,
        )
        validation = DataLoader(Turning(module), batch_size=None)
        trainer.fit(module, make_loader(shuffle=True), validation, ckpt_path=ckpt_path)

    fit(tmp_path / "whole", breaks=False)
    with pytest.raises(KeyError, match="power cut"):
        fit(tmp_path / "broken", breaks=True)
    fit(tmp_path / "broken", breaks=False, ckpt_path=tmp_path / "broken" / "last.ckpt")

    whole = tmp_path / "whole" / "attention.csv"
    assert (tmp_path / "broken" / "attention.csv").read_bytes() == whole.read_bytes()
    assert len(read_attention(whole)) == 4 * n_bags


def test_monitor__fit_that_goes_on__keeps_the_rows_and_the_last_attention(tmp_path):
    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK), max_epochs=2)
    module = seeded_module()
    trainer.fit(module, make_loader(), make_loader())
    first = read_attention(tmp_path / "attention.csv")
    trainer.fit_loop.max_epochs = 3

    trainer.fit(module, make_loader(), make_loader())

    rows = read_attention(tmp_path / "attention.csv")
    assert rows[:24] == first
    assert [row.epoch for row in rows[24:]] == [2] * 12
    assert all(row.jsd is not None for row in rows[24:])


def test_monitor__second_model__starts_anew(tmp_path):
    monitor = AttentionMonitor(BLOCK)
    for _ in range(2):
        trainer = make_trainer(tmp_path, monitor, max_epochs=1)
        trainer.fit(seeded_module(), make_loader(), make_loader())

    rows = read_attention(tmp_path / "attention.csv")
    assert len(rows) == 12
    assert all(row.jsd is None for row in rows)


def test_monitor__bags_without_ids_or_of_another_size__are_numbered_and_skipped(tmp_path):
    batches = make_batches(2)
    for batch in batches:
        del batch["bag_id"]

    class Growing(TinyModule):
        def loss(self, batch):
            # One instance less in every validation epoch.
            kept = batch["features"][:, : 5 - self.current_epoch]
            return super().loss({**batch, "features": kept})

    file = tmp_path / "own" / "file.csv"
    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK, path=file))
    trainer.fit(seeded_module(Growing), make_loader(batches), make_loader(batches))

    rows = read_attention(file)
    assert [row.bag_id for row in rows[:4]] == ["0:0:0", "0:0:1", "0:1:0", "0:1:1"]
    assert all(row.jsd is None for row in rows)
    assert "attention/jsd" not in trainer.callback_metrics


def test_monitor__padded_batch__measures_real_instances_only(tmp_path):
    features = torch.randn(1, 5, 4)
    padded = torch.cat([features, torch.full((1, 3, 4), 7.0)], dim=1)
    entropies = []
    for batch in (
        {"features": features, "mask": torch.ones(1, 5, dtype=torch.bool)},
        {"features": padded, "mask": torch.arange(8)[None] < 5},
    ):
        batch |= {"label": torch.tensor([1]), "bag_id": ["a"]}
        trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK), max_epochs=1)
        trainer.fit(seeded_module(), make_loader(make_batches(1)), make_loader([batch]))
        entropies.append(read_attention(tmp_path / "attention.csv")[0].entropy)

    assert entropies[0] == pytest.approx(entropies[1], abs=1e-6)


def test_monitor__input_changed_in_place_after_the_block__does_not_matter(tmp_path):
    class Changing(TinyModule):
        def loss(self, batch):
            if self.training:
                return super().loss(batch)
            hidden = self.net.encoder(batch["features"])
            self.net.attention(hidden)
            return hidden.mul_(2).sum()

    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK), max_epochs=1)
    trainer.fit(seeded_module(Changing), make_loader(), make_loader())

    assert len(read_attention(tmp_path / "attention.csv")) == 12


def test_monitor__padding_that_changes_between_epochs__leaves_the_jsd(tmp_path):
    class Growing(IterableDataset):
        n_padding = 0

        def __iter__(self):
            self.n_padding += 1
            padding = torch.full((1, self.n_padding, 4), 7.0)
            yield {
                "features": torch.cat([torch.ones(1, 5, 4), padding], dim=1),
                "mask": torch.arange(5 + self.n_padding)[None] < 5,
                "label": torch.tensor([1]),
                "bag_id": ["a"],
            }

    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK))
    trainer.fit(
        seeded_module(), make_loader(make_batches(1)), DataLoader(Growing(), batch_size=None)
    )

    assert [row.jsd is None for row in read_attention(tmp_path / "attention.csv")] == [True, False]


def test_monitor__block_that_is_called_twice__is_refused_or_not_monitored(tmp_path):
    class Twice(TinyModule):
        def loss(self, batch):
            return super().loss(batch) + super().loss(batch)

    message = "one attention per bag, but the attention block gave 4"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, AttentionMonitor(BLOCK)).fit(
            seeded_module(Twice), make_loader(), make_loader()
        )
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, AttentionMonitor(BLOCK, strict=False)).fit(
            seeded_module(Twice), make_loader(), make_loader()
        )
    assert read_attention(tmp_path / "attention.csv") == []


def test_monitor__max_bags__watches_the_first_of_the_first_validation_ever_after(tmp_path):
    module = seeded_module()
    monitor = AttentionMonitor(BLOCK, max_bags=3)
    trainer = make_trainer(tmp_path, monitor, max_epochs=3)
    trainer.fit(module, make_loader(), DataLoader(Turning(module), batch_size=None))

    watched = {"bag0_0", "bag0_1", "bag1_0"}
    rows = read_attention(tmp_path / "attention.csv")
    assert [row.epoch for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert all({row.bag_id for row in rows[i : i + 3]} == watched for i in (0, 3, 6))
    assert all((row.jsd is None) == (row.epoch == 0) for row in rows)
    kept = monitor.state_dict()["previous"]
    assert kept.keys() == watched
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}


def test_monitor__max_bags_and_several_processes__takes_them_in_turn_and_each_once(
    tmp_path, monkeypatch
):
    own = [f"bag{index}_{bag}" for index in range(6) for bag in range(2)]
    # The other process starts with a bag of this one, as a sampler that repeats bags makes it.
    names = dict(zip(own, ["bag0_0", *(f"far{index}" for index in range(11))], strict=True))

    def gather(value):
        if isinstance(value.get("bag0_0"), torch.Tensor):
            return [value, {names[bag_id]: kept for bag_id, kept in value.items()}]
        # That process has kept no attention of the bag that it repeats.
        far = {names[i]: row._replace(bag_id=names[i], jsd=None) for i, row in value.items()}
        return [value, far]

    monkeypatch.setattr("mil_anchor.callbacks.monitor.gather_objects", gather)
    monitor = AttentionMonitor(BLOCK, max_bags=4)
    make_trainer(tmp_path, monitor).fit(seeded_module(), make_loader(), make_loader())

    rows = read_attention(tmp_path / "attention.csv")
    watched = ["bag0_0", "bag0_1", "far0", "bag1_0"]
    assert sorted(row.bag_id for row in rows if row.epoch == 0) == sorted(watched)
    assert sorted(row.bag_id for row in rows if row.epoch == 1) == sorted(watched)
    assert all(row.jsd is not None for row in rows[4:] if row.bag_id != "far0")
    assert monitor.state_dict()["watched"] == watched


@pytest.mark.parametrize("max_bags", [0, -1])
def test_monitor__max_bags_below_one__is_refused(max_bags):
    with pytest.raises(ValueError, match=f"max_bags must be at least 1, .*, but got {max_bags}"):
        AttentionMonitor(max_bags=max_bags)


def test_monitor__attention_that_does_not_move__is_stable_to_the_rounding_of_what_is_kept(tmp_path):
    class Still(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    batches = make_batches(1, n_instances=1000)
    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK))
    trainer.fit(seeded_module(Still), make_loader(batches), make_loader(batches))

    for row in read_attention(tmp_path / "attention.csv")[2:]:
        assert row.jsd == pytest.approx(0, abs=5e-8)
        assert row.rank_correlation == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore:AttentionMonitor could not prove")
def test_monitor__equal_scores__have_no_rank_correlation_and_warn_once(tmp_path):
    class Equal(TinyModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            torch.nn.init.zeros_(self.net.attention[-1].weight)
            self.net.attention.requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK, strict=False), max_epochs=4)
    with pytest.warns(UserWarning, match="validation attention has become uniform") as warned:
        trainer.fit(seeded_module(Equal), make_loader(), make_loader())

    assert sum("uniform" in str(warning.message) for warning in warned) == 1
    rows = read_attention(tmp_path / "attention.csv")
    assert len(rows) == 4 * 12
    assert all(row.rank_correlation is None for row in rows)
    assert all(row.jsd == pytest.approx(0, abs=1e-12) for row in rows[12:])


def _fit_transmil(folder, site=None, *, batch_size=1):
    generator = torch.Generator().manual_seed(0)
    bags = [
        Bag(torch.randn(2 + 5 * i, 6, generator=generator), label=i % 2, bag_id=f"bag{i}")
        for i in range(6)
    ]
    torch.manual_seed(0)
    module = MILModule(TransMIL(6, 2, hidden=16, n_heads=4), n_classes=2, lr=0.01)
    trainer = make_trainer(folder, AttentionMonitor(site))
    trainer.fit(module, datamodule=BagDataModule(bags[:2], bags[2:], batch_size=batch_size))
    assert not any(part._forward_hooks for part in module.modules())
    return module, bags[2:], trainer.callback_metrics, read_attention(folder / "attention.csv")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_monitor__transmil__compares_its_scores_with_what_it_mixes_by(tmp_path, batch_size):
    module, bags, logged, rows = _fit_transmil(tmp_path, batch_size=batch_size)

    module.eval()
    mixed = []
    layer = module.model.layers[1].attention
    layer.mixing_row.register_forward_hook(lambda *call: mixed.append(call[2][0]))
    for bag, row in zip(bags, rows[4:], strict=True):
        with torch.no_grad():
            scores = module.model(bag.features[None]).scores[0]
        pairs = zip(scores, mixed.pop()[:, : len(bag.features)], strict=True)
        expected = sum(spearmanr(*pair).statistic for pair in pairs) / 4
        assert row.mixing_correlation == pytest.approx(expected, abs=1e-6)
    mean = sum(row.mixing_correlation for row in rows[4:]) / 4
    assert logged["attention/mixing_correlation"].item() == pytest.approx(mean, abs=1e-6)


def test_monitor__transmil_by_a_path__leaves_the_column_empty(tmp_path):
    path = "model.layers.-1.attention.query_key"
    site = AttentionSite(path, layout="b r n", surrogate=True)

    assert all(row.mixing_correlation is None for row in _fit_transmil(tmp_path, site)[3])


def test_monitor__mixing_that_is_no_row_of_instances__is_refused(tmp_path):
    site = AttentionSite(
        "model.layers.-1.attention.query_key",
        layout="b r n",
        surrogate=True,
        mixing="model.layers.-1.norm",
    )

    message = r"'model\.layers\.-1\.norm' must put out how the model mixes each bag"
    with pytest.raises(MisconfigurationException, match=message):
        _fit_transmil(tmp_path, site)


def test_read_attention__missing_columns__are_named(tmp_path):
    file = tmp_path / "attention.csv"
    file.write_text("epoch,bag_id,jsd,entropy\n0,a,,0.5\n")

    message = (
        r"attention\.csv must have .* but \['weights', 'rank_correlation', 'top1pct'.* missing"
    )
    with pytest.raises(ValueError, match=message):
        read_attention(file)
