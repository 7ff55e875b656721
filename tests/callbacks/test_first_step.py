"""What users do that the first step must see through: wrong sites, warm-ups, odd batches."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint

from mil_anchor import AnchorCallback, AttentionMonitor, AttentionSite, Site
from mil_anchor.callbacks.recorder import n_bags_of
from tests.callbacks.tiny import (
    TinyModule,
    assert_clean,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

BLOCK = "net.attention"


def _fit(folder, module, *callbacks, batches=None, **options):
    trainer = make_trainer(folder, *callbacks, max_epochs=1, **options)
    trainer.fit(module, make_loader(batches or make_batches(n_bags=1)))
    return trainer


@pytest.mark.parametrize("site", ["net.head", AttentionSite(BLOCK, layout="b r n")])
def test_proof__site_that_reads_one_instance__is_refused(tmp_path, site):
    class OneRow(TinyModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.net.attention[-1] = nn.Linear(6, 1)

        def loss(self, batch):
            hidden = self.net.encoder(batch["features"])
            attention = self.net.attention(hidden).softmax(dim=1)
            logits = self.net.head((attention * hidden).sum(dim=1))
            return nn.functional.cross_entropy(logits, batch["label"])

    module = seeded_module(OneRow)
    with pytest.raises(MisconfigurationException, match=r"ran no softmax over [12] instances|none"):
        _fit(tmp_path, module, AnchorCallback(site))
    assert_clean(module)


def test_proof__scores_that_never_differ__is_missed_with_a_warning(tmp_path):
    module = seeded_module()
    batches = make_batches(n_bags=1, n_instances=1)

    with pytest.warns(UserWarning, match=r"could not prove .* in the first 6 steps: no bag had"):
        _fit(tmp_path, module, AnchorCallback(BLOCK), batches=batches)


def test_proof__zero_initialised_scorer__is_proven_once_it_has_moved(tmp_path):
    class Zero(TinyModule):
        temperature = 1.0

        def __init__(self, **options) -> None:
            super().__init__(**options)
            nn.init.zeros_(self.net.attention[-1].weight)

        def loss(self, batch):
            hidden = self.net.encoder(batch["features"])
            scores = self.net.attention(hidden) / self.temperature
            pooled = scores.softmax(dim=1).mT @ hidden
            return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])

    trainer = _fit(tmp_path, seeded_module(Zero), AnchorCallback())
    assert trainer.callback_metrics["anchor/kl"] >= 0

    module = seeded_module(Zero)
    module.temperature = 0.5
    with pytest.raises(MisconfigurationException, match="multiplies them by 2 before its softmax"):
        _fit(tmp_path, module, AnchorCallback(BLOCK))


class Scaled(TinyModule):
    """Divides its scores by a number that depends on the bag."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        scores = self.net.attention(hidden) / hidden.shape[1] ** 0.5
        pooled = scores.softmax(dim=1).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


def test_proof__scale_that_depends_on_the_bag__is_refused_at_the_second_size(tmp_path):
    batches = [*make_batches(2, n_instances=4), *make_batches(2, n_instances=9)]

    with pytest.raises(MisconfigurationException, match=r"multiplies them by 0\.666667 before"):
        _fit(tmp_path, seeded_module(Scaled), AnchorCallback(), batches=batches)


def test_manual_optimization__checkpointed_model__counts_its_attention_once(tmp_path):
    class Manual(TinyModule):
        def __init__(self, *, recompute, **options) -> None:
            super().__init__(**options)
            self.automatic_optimization = False
            self.recompute = recompute

        def training_step(self, batch, batch_idx):
            features = batch["features"]
            net = lambda x: checkpoint(self.net, x, use_reentrant=False)  # noqa: E731
            logits = (net if self.recompute else self.net)(features)
            first = nn.functional.cross_entropy(logits, batch["label"])
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(first, retain_graph=True)
            self.manual_backward(logits.square().mean())
            optimizer.step()

    trained = []
    for recompute in (False, True):
        module = seeded_module(Manual, dropout=0.0, recompute=recompute)
        plugin = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
        _fit(tmp_path, module, plugin, batches=make_batches(4))
        trained.append(parameters_of(module) | plugin.state_dict()["anchor"])
    assert_equal_states(*trained)


class WarmUp(TinyModule):
    """Trains its encoder alone at first."""

    def training_step(self, batch, batch_idx):
        if batch_idx < 2:
            return self.net.encoder(batch["features"]).square().mean()
        return super().training_step(batch, batch_idx)


def test_search__warm_up_without_attention__waits(tmp_path):
    plugin = AnchorCallback(weight=0.5)

    trainer = _fit(tmp_path, seeded_module(WarmUp), plugin)

    assert trainer.callback_metrics["anchor/kl"] > 0


def test_search__ten_steps_without_attention__gives_up(tmp_path):
    class Never(TinyModule):
        steps = 0

        def training_step(self, batch, batch_idx):
            Never.steps += 1
            return self.net.encoder(batch["features"]).square().mean()

    with pytest.raises(MisconfigurationException, match="no submodule that ran with gradients"):
        _fit(tmp_path, seeded_module(Never), AnchorCallback(), batches=make_batches(30))
    assert Never.steps == 10


def test_search__raw_backward_in_manual_optimization__is_told(tmp_path):
    class Raw(TinyModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.loss(batch).backward()

    with pytest.raises(MisconfigurationException, match=r"Replace loss\.backward\(\)"):
        _fit(tmp_path, seeded_module(Raw), AnchorCallback())


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"mask": torch.ones(3, 4), "label": torch.ones(1)}, 3),
        ({"bag_id": ["a", "b"], "label": torch.ones(1)}, 2),
        ({"features": torch.ones(2, 4, 3), "label": torch.ones(5)}, 2),
        ({"features": torch.ones(8, 3), "label": torch.ones(2)}, 2),
        ({"label": torch.ones(2)}, 2),
        ({"label": (torch.ones(1), torch.ones(1))}, None),
        ({"label": torch.ones(2, 5)}, None),
        ((torch.ones(2, 4, 3),), None),
    ],
)
def test_n_bags__is_told_by_what_counts_bags_only(batch, expected):
    assert n_bags_of(batch) == expected


def test_label_of_several_numbers__does_not_count_bags(tmp_path):
    class Survival(TinyModule):
        def loss(self, batch):
            return super().loss({**batch, "label": batch["label"][0][None]})

    batches = [{**b, "label": torch.tensor([1, 0])} for b in make_batches(n_bags=1)]
    for batch in batches:
        del batch["bag_id"]

    trainer = _fit(tmp_path, seeded_module(Survival), AnchorCallback(BLOCK), batches=batches)

    assert trainer.callback_metrics["anchor/kl"] >= 0


def test_state_key__is_the_same_in_every_process_and_for_a_path_and_its_site():
    class Own(Site):
        path = "a.b"
        within = find_block = watched = read = rescore = None

    assert "0x" not in AnchorCallback(Own()).state_key
    assert AnchorCallback("x").state_key == AnchorCallback(AttentionSite("x")).state_key
    assert AnchorCallback("x").state_key != AnchorCallback("y").state_key


def test_search__vmap_in_the_model__is_passed_over(tmp_path):
    class Mapped(TinyModule):
        def loss(self, batch):
            hidden = torch.vmap(self.net.encoder)(batch["features"])
            pooled = self.net.attention(hidden).softmax(dim=1).mT @ hidden
            return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])

    trainer = _fit(tmp_path, seeded_module(Mapped, dropout=0.0), AnchorCallback())

    assert trainer.callback_metrics["anchor/kl"] >= 0


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
def test_scripted_block__is_refused_and_leaves_no_hook(tmp_path):
    module = seeded_module(dropout=0.0)
    module.net.attention = torch.jit.script(module.net.attention)

    for callback in (AnchorCallback(BLOCK), AttentionMonitor(BLOCK)):
        with pytest.raises(ValueError, match="must run in Python to be seen, but"):
            _fit(tmp_path, module, callback)
        assert_clean(module)


def test_empty_bag__is_refused_by_name(tmp_path):
    batches = make_batches(3, n_bags=1)
    batches[2]["features"] = torch.zeros(1, 0, 4)

    with pytest.raises(ValueError, match=r"bags \['bag2_0'\]: Every bag needs a real instance"):
        _fit(tmp_path, seeded_module(), AnchorCallback(BLOCK), batches=batches)


# Lightning knows the other key only.
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_checkpoint__of_a_found_site__carries_over_to_the_line_that_names_it(tmp_path):
    found = AnchorCallback(weight=0.5, decay=0.9)
    trainer = _fit(tmp_path, seeded_module(), found)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    anchor = found.state_dict()["anchor"]

    named = AnchorCallback(AttentionSite(BLOCK, layout="b n r"), decay=0.9, update="epoch")
    module = seeded_module()
    again = make_trainer(tmp_path, named, max_epochs=2)
    again.fit(module, make_loader(make_batches()), ckpt_path=tmp_path / "end.ckpt")

    online = parameters_of(module.net.attention)
    for name, tensor in named.state_dict()["anchor"].items():
        assert torch.allclose(tensor, 0.9 * anchor[name] + 0.1 * online[name], atol=1e-6), name


def test_monitor__block_that_never_trains__says_that_it_did_not_run(tmp_path):
    class EvaluationOnly(TinyModule):
        def training_step(self, batch, batch_idx):
            return self.net.encoder(batch["features"]).square().mean()

    with pytest.warns(UserWarning, match=r"the first 6 steps: it did not run with gradients"):
        _fit(tmp_path, seeded_module(EvaluationOnly), AttentionMonitor(BLOCK))
