"""The first training step shows an attention that nobody has named."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from mil_anchor import AnchorCallback
from mil_anchor.sites.normalizations import NormalizationWatch
from tests.callbacks.searching import (
    BLOCK,
    SITE,
    Steps,
    anchor_plugin,
    assert_same,
    drop_anchors,
    found_lines,
    run_pasted,
    train,
)
from tests.callbacks.subjects import SUBJECTS
from tests.callbacks.tiny import (
    TinyModule,
    assert_clean,
    make_batches,
    make_loader,
    make_trainer,
    seeded_module,
)


def test_search__unknown_model__logs_one_line_and_that_line_pasted_trains_the_same(
    tmp_path, unknown, caplog
):
    with caplog.at_level("INFO"):
        found = train(
            tmp_path,
            seeded_module(unknown.module),
            [AnchorCallback()],
            batches=unknown.batches(),
        )
        lines = found_lines(caplog)
        caplog.clear()
        again = train(
            tmp_path,
            seeded_module(unknown.module),
            [run_pasted(*lines)],
            batches=unknown.batches(),
        )

    assert len(lines) == 1
    assert f"'{unknown.block}'" in lines[0]
    assert "kl" in found[-1]
    assert_same(found, again)
    assert not found_lines(caplog)


def test_search__known_model__logs_nothing(tmp_path, caplog):
    subject = SUBJECTS["torchmil"]

    with caplog.at_level("INFO"):
        train(tmp_path, seeded_module(subject.module), [anchor_plugin()], batches=subject.batches())

    assert not found_lines(caplog)


class NoneFirst:
    """Runs the model in its first step and skips that step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if self.global_step == 0 and batch_idx == 0 else loss


class Manual:
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Plain:
    """Nothing of its own."""


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    ("how", "options"),
    [
        (Plain, {}),
        (NoneFirst, {}),
        (Manual, {}),
        (Plain, {"accumulate_grad_batches": 4}),
        (Plain, {"precision": "bf16-mixed"}),
        (Plain, {"precision": "bf16-true"}),
        (Plain, {"gradient_clip_val": 0.05}),
        (Plain, {"num_sanity_val_steps": 2}),
    ],
    ids=["plain", "none_first", "manual", "accumulation", "bf16", "bf16_true", "clip", "sanity"],
)
def test_search__in_any_setting__trains_like_the_named_site_from_step_one(
    tmp_path, unknown, how, options
):
    runs = [
        train(
            tmp_path,
            seeded_module(unknown.variant(how), dropout=0.3 * (not options)),
            [anchor_plugin(site)],
            batches=unknown.batches(),
            validate="num_sanity_val_steps" in options,
            **options,
        )
        for site in (unknown.site, None)
    ]

    if how is NoneFirst:  # nothing is found in a step without a loss, and the anchor starts later
        drop_anchors(runs[0][0])
    assert_same(*runs)
    assert any(name.startswith("anchor of") for name in runs[1][1])


@pytest.mark.slow
# Dynamo looks at .grad of an intermediate tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", ["module", "model", "block"])
def test_search__compiled_model__trains_like_the_named_site_in_eager_mode(
    tmp_path, unknown, compiled
):
    plain, module = (seeded_module(unknown.module, dropout=0.0) for _ in range(2))
    fitted = module
    if compiled == "module":
        fitted = torch.compile(module, backend="eager")
    else:
        part = unknown.path if compiled == "model" else unknown.block
        module.get_submodule(part).compile(backend="eager")
    looks = HookedParts()

    run = train(
        tmp_path, module, [anchor_plugin(), looks], batches=unknown.batches(), fitted=fitted
    )
    torch.compiler.reset()

    assert_same(
        train(tmp_path, plain, [anchor_plugin(unknown.site)], batches=unknown.batches()), run
    )
    assert set(looks.seen) == {(unknown.block, *_tap_of(unknown))}
    assert not any(part._forward_hooks for part in module.modules())


def _tap_of(subject):
    return [] if isinstance(subject.site, str) else [f"{subject.block}.{subject.site.tap}"]


class HookedParts(Callback):
    """Which submodules have hooks after each step."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        parts = pl_module.named_modules()
        self.seen.append(tuple(name for name, part in parts if part._forward_hooks))


@pytest.mark.parametrize("named", [False, True])
def test_search__after_the_first_step__costs_nothing_but_the_recorder(
    tmp_path, unknown, named, monkeypatch
):
    watched, stacks, looks = [], [], HookedParts()
    dispatch = NormalizationWatch.__torch_dispatch__

    def counting(self, *args, **kwargs):
        watched[-1] += 1
        return dispatch(self, *args, **kwargs)

    class Looking:
        def training_step(self, batch, batch_idx):
            watched.append(0)
            stacks.append(len(_get_current_dispatch_mode_stack()))
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(NormalizationWatch, "__torch_dispatch__", counting)
    module = seeded_module(unknown.variant(Looking))
    plugin = anchor_plugin(unknown.site if named else None)

    train(tmp_path, module, [plugin, looks], batches=unknown.batches())

    assert watched[0] > 0
    assert watched[1:] == [0] * 11
    assert stacks == [1] + [0] * 11
    assert looks.seen == [(unknown.block, *_tap_of(unknown))] * 12
    assert_clean(module)


@pytest.mark.parametrize("named", [False, True])
def test_search__weight_0__trains_as_without_plugin_and_draws_no_random_numbers(
    tmp_path, unknown, named
):
    plugin = anchor_plugin(unknown.site if named else None, weight=0.0)
    runs = [
        train(tmp_path, seeded_module(unknown.module), callbacks, batches=unknown.batches())
        for callbacks in ([], [plugin])
    ]

    assert runs[1][-1].pop("kl") > 0
    drop_anchors(*runs[1])
    assert_same(*runs)


class AlwaysDropping(nn.Linear):
    """Drops features in evaluation mode too."""

    def forward(self, hidden):
        return super().forward(nn.functional.dropout(hidden, 0.3, training=True))


def test_anchor_callback__block_that_always_draws__leaves_the_models_random_numbers(tmp_path):
    runs = []
    for callbacks in ([], [anchor_plugin(SITE, weight=0.0)]):
        module = seeded_module()
        module.net.attention = AlwaysDropping(8, 2)  # of the same weights: the seed is set
        runs.append(train(tmp_path, module, callbacks))

    del runs[1][-1]["kl"]
    drop_anchors(*runs[1])
    assert_same(*runs)


class Counting(AnchorCallback):
    """Counts the steps that have a penalty."""

    n_penalties = 0

    def penalty(self, attention):
        self.n_penalties += 1
        return super().penalty(attention)


class RowsToHead(TinyModule):
    """Its head takes the pooled features of both rows, (bag, row, width)."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        pooled = torch.softmax(self.net.attention(hidden), dim=1).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled).mean(1), batch["label"])


@pytest.mark.parametrize("n_bags", [1, 2])
@pytest.mark.parametrize("cls", [TinyModule, RowsToHead])
@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_search__first_bags_of_one_instance__waits_and_finds_in_the_first_bag_of_two(
    tmp_path, returns, cls, n_bags, caplog
):
    batches = [*make_batches(2, n_bags, 1), *make_batches(4, n_bags, 2)]
    plugin = Counting(weight=0.5, decay=0.9)
    with caplog.at_level("INFO"):
        found = train(
            tmp_path,
            seeded_module(cls, returns=returns),
            [plugin],
            batches=batches,
            max_epochs=1,
        )
    bare = train(tmp_path, seeded_module(cls, returns=returns), batches=batches, max_epochs=1)

    assert found_lines(caplog) == [f"Counting({SITE})"]
    assert_same(found[:2], bare[:2])
    assert all(any("anchor" in name for name in state) for state in found[2:-1])
    assert plugin.n_penalties == 4
    assert found[-1]["kl"] > 0


class UnderNoGrad(TinyModule):
    """Runs its model where nothing can be regularised."""

    def loss(self, batch):
        with torch.no_grad():
            self.net(batch["features"])
        return sum(parameter.square().sum() for parameter in self.parameters())


class Reentrant(TinyModule):
    """Runs all of its model under the checkpointing that hides it."""

    def loss(self, batch):
        start = torch.zeros((), requires_grad=True)
        return checkpoint(lambda _: TinyModule.loss(self, batch), start, use_reentrant=True)


@pytest.mark.parametrize(
    ("cls", "n_instances"), [(TinyModule, 1), (UnderNoGrad, 5), (Reentrant, 5)]
)
@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_search__epoch_that_shows_no_attention__says_so(tmp_path, cls, n_instances, returns):
    module = seeded_module(cls, returns=returns)
    loader = make_loader(make_batches(n_bags=1, n_instances=n_instances))

    with pytest.raises(MisconfigurationException, match=rf"attention of {cls.__name__} must be fo"):
        make_trainer(tmp_path, anchor_plugin()).fit(module, loader)
    assert_clean(module)


def test_proof__first_bags_of_one_instance__waits_for_the_first_bag_of_two(tmp_path):
    batches = [*make_batches(2, n_instances=1), *make_batches(1)]
    steps = Steps()
    trainer = make_trainer(tmp_path, anchor_plugin(f"{BLOCK}.0"), steps)

    with pytest.raises(MisconfigurationException, match=r"attention block 'net\.attention\.0'"):
        trainer.fit(seeded_module(), make_loader(batches))

    assert len(steps.states) == 2
