import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from mil_anchor import AnchorCallback, AttentionMonitor, RandomState
from mil_anchor.callbacks.monitor import read_attention
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


def _naive_jsd(p, q):
    middle = (p + q) / 2
    one, two = (p * (p / middle).log()).sum(-1), (q * (q / middle).log()).sum(-1)
    return ((one + two) / 2).mean(-1)


def test_monitor__every_epoch_and_bag__writes_jsd_and_entropy_as_defined(tmp_path):
    module = seeded_module(Watched)
    trainer = make_trainer(tmp_path, AttentionMonitor(BLOCK), max_epochs=3, num_sanity_val_steps=2)
    batches = make_batches(2)

    trainer.fit(module, make_loader(batches), make_loader(batches))

    rows = read_attention(tmp_path / "attention.csv")
    maps = torch.stack(module.maps[2:]).unflatten(0, (3, 2)).flatten(1, 2)  # epoch, bag, row, n
    assert [row.epoch for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row.bag_id for row in rows[:4]] == ["bag0_0", "bag0_1", "bag1_0", "bag1_1"]
    entropy = -(maps * maps.log()).sum(-1).mean(-1) / torch.log(torch.tensor(5.0))
    for row, expected in zip(rows, entropy.flatten(), strict=True):
        assert row.entropy == pytest.approx(expected.item(), abs=1e-5)
    assert all(row.jsd is None for row in rows[:4])
    jsd = _naive_jsd(maps[1:], maps[:-1])
    for row, expected in zip(rows[4:], jsd.flatten(), strict=True):
        assert row.jsd == pytest.approx(expected.item(), abs=1e-5)
    logged = trainer.callback_metrics
    assert logged["attention/jsd"].item() == pytest.approx(jsd[-1].mean().item(), abs=1e-5)
    assert logged["attention/entropy"].item() == pytest.approx(entropy[-1].mean().item(), abs=1e-5)


def test_monitor__beside_a_plugin__changes_nothing_in_training(tmp_path):
    trained = []
    for callbacks in ([], [AttentionMonitor(BLOCK)]):
        module = seeded_module()
        plugin = AnchorCallback(BLOCK, weight=0.5)
        make_trainer(tmp_path, plugin, *callbacks).fit(module, make_loader(), make_loader())
        trained.append(parameters_of(module))
        assert not module.net.attention._forward_hooks

    assert_equal_states(*trained)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_monitor__stop_and_resume__writes_the_file_of_the_uninterrupted_run(tmp_path):
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
            AttentionMonitor(BLOCK),
            RandomState(),
            keeper,
            max_epochs=4,
            enable_checkpointing=True,
        )
        trainer.fit(module, make_loader(shuffle=True), make_loader(), ckpt_path=ckpt_path)

    fit(tmp_path / "whole", breaks=False)
    with pytest.raises(KeyError, match="power cut"):
        fit(tmp_path / "broken", breaks=True)
    fit(tmp_path / "broken", breaks=False, ckpt_path=tmp_path / "broken" / "last.ckpt")

    whole = read_attention(tmp_path / "whole" / "attention.csv")
    assert read_attention(tmp_path / "broken" / "attention.csv") == whole
    assert len(whole) == 4 * 12


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
