"""The first training step: the attention is searched where it is unknown, and proven always."""

import copy
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import mil_anchor
from mil_anchor import AnchorCallback, AttentionMonitor, AttentionSite, RandomState, Site
from mil_anchor.callbacks.monitor import read_attention
from mil_anchor.sites.base import RecordedAttention, find_submodule, joined
from mil_anchor.sites.normalizations import NormalizationWatch
from tests.callbacks.subjects import SUBJECTS
from tests.callbacks.tiny import (
    Recipe,
    TinyMIL,
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
SITE = AttentionSite(BLOCK, layout="b n r")


@pytest.fixture
def unknown(subject, monkeypatch):
    """Each module in turn, of a model that no registry knows."""
    monkeypatch.setattr("mil_anchor.sites.registry._REGISTRY", {})
    return subject


class Steps(Callback):
    """What training and anchor are after each step."""

    def __init__(self) -> None:
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = parameters_of(pl_module)
        for plugin in trainer.callbacks:
            if isinstance(plugin, AnchorCallback):
                anchor = plugin.state_dict().get("anchor", {})
                state |= {f"anchor of {name}": value.clone() for name, value in anchor.items()}
        self.states.append(state)


def _plugin(site=None, **options):
    return AnchorCallback(site, **{"weight": 0.5, "decay": 0.9, **options})


def _train(folder, module, callbacks=(), *, batches=None, fitted=None, validate=False, **options):
    """What training is after each step, and what it ends with."""
    torch.manual_seed(1)
    steps = Steps()
    trainer = make_trainer(folder, *callbacks, steps, **options)
    loader = make_loader(batches)
    trainer.fit(module if fitted is None else fitted, loader, loader if validate else None)
    end = {"random": torch.get_rng_state()}
    if "anchor/kl" in trainer.callback_metrics:
        end["kl"] = trainer.callback_metrics["anchor/kl"]
    assert len(steps.states) > 1
    return [*steps.states, end]


def _assert_same(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert_equal_states(mine, theirs)


def _drop_anchors(*states):
    for state in states:
        for name in [name for name in state if name.startswith("anchor of")]:
            del state[name]


def _found(caplog):
    """The log lines that say what was found, each with what it tells to paste."""
    said = [r.getMessage() for r in caplog.records if "mil_anchor" in Path(r.pathname).parts]
    assert all("found the attention" in line for line in said), said
    return [re.search(r"To name it: (.*)\.$", line)[1] for line in said]


def _pasted(line, **options):
    """The callback that a line makes, as its user would run it."""
    return eval(line[:-1] + "".join(f", {k}={v!r}" for k, v in options.items()) + ")", PASTED)


PASTED = dict(vars(mil_anchor))


# What is found ------------------------------------------------------------------------------------


def test_search__unknown_model__logs_one_line_and_that_line_pasted_trains_the_same(
    tmp_path, unknown, caplog
):
    with caplog.at_level("INFO"):
        found = _train(
            tmp_path,
            seeded_module(unknown.module),
            [AnchorCallback()],
            batches=unknown.batches(),
        )
        lines = _found(caplog)
        caplog.clear()
        again = _train(
            tmp_path,
            seeded_module(unknown.module),
            [_pasted(*lines)],
            batches=unknown.batches(),
        )

    assert len(lines) == 1
    assert f"'{unknown.block}'" in lines[0]
    assert "kl" in found[-1]
    _assert_same(found, again)
    assert not _found(caplog)


def test_search__known_model__logs_nothing(tmp_path, caplog):
    subject = SUBJECTS["torchmil"]

    with caplog.at_level("INFO"):
        _train(tmp_path, seeded_module(subject.module), [_plugin()], batches=subject.batches())

    assert not _found(caplog)


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
        _train(
            tmp_path,
            seeded_module(unknown.variant(how), dropout=0.3 * (not options)),
            [_plugin(site)],
            batches=unknown.batches(),
            validate="num_sanity_val_steps" in options,
            **options,
        )
        for site in (unknown.site, None)
    ]

    if how is NoneFirst:  # nothing is found in a step without a loss, and the anchor starts later
        _drop_anchors(runs[0][0])
    _assert_same(*runs)
    assert any(name.startswith("anchor of") for name in runs[1][1])


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

    run = _train(tmp_path, module, [_plugin(), looks], batches=unknown.batches(), fitted=fitted)
    torch.compiler.reset()

    _assert_same(_train(tmp_path, plain, [_plugin(unknown.site)], batches=unknown.batches()), run)
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
    plugin = _plugin(unknown.site if named else None)

    _train(tmp_path, module, [plugin, looks], batches=unknown.batches())

    assert watched[0] > 0
    assert watched[1:] == [0] * 11
    assert stacks == [1] + [0] * 11
    assert looks.seen == [(unknown.block, *_tap_of(unknown))] * 12
    assert_clean(module)


@pytest.mark.parametrize("named", [False, True])
def test_search__weight_0__trains_as_without_plugin_and_draws_no_random_numbers(
    tmp_path, unknown, named
):
    plugin = _plugin(unknown.site if named else None, weight=0.0)
    runs = [
        _train(tmp_path, seeded_module(unknown.module), callbacks, batches=unknown.batches())
        for callbacks in ([], [plugin])
    ]

    assert runs[1][-1].pop("kl") > 0
    _drop_anchors(*runs[1])
    _assert_same(*runs)


class AlwaysDropping(nn.Linear):
    """Drops features in evaluation mode too."""

    def forward(self, hidden):
        return super().forward(nn.functional.dropout(hidden, 0.3, training=True))


def test_anchor_callback__block_that_always_draws__leaves_the_models_random_numbers(tmp_path):
    runs = []
    for callbacks in ([], [_plugin(SITE, weight=0.0)]):
        module = seeded_module()
        module.net.attention = AlwaysDropping(8, 2)  # of the same weights: the seed is set
        runs.append(_train(tmp_path, module, callbacks))

    del runs[1][-1]["kl"]
    _drop_anchors(*runs[1])
    _assert_same(*runs)


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
        found = _train(
            tmp_path,
            seeded_module(cls, returns=returns),
            [plugin],
            batches=batches,
            max_epochs=1,
        )
    bare = _train(tmp_path, seeded_module(cls, returns=returns), batches=batches, max_epochs=1)

    assert _found(caplog) == [f"Counting({SITE})"]
    _assert_same(found[:2], bare[:2])
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
        make_trainer(tmp_path, _plugin()).fit(module, loader)
    assert_clean(module)


def test_proof__first_bags_of_one_instance__waits_for_the_first_bag_of_two(tmp_path):
    batches = [*make_batches(2, n_instances=1), *make_batches(1)]
    steps = Steps()
    trainer = make_trainer(tmp_path, _plugin(f"{BLOCK}.0"), steps)

    with pytest.raises(MisconfigurationException, match=r"attention block 'net\.attention\.0'"):
        trainer.fit(seeded_module(), make_loader(batches))

    assert len(steps.states) == 2


# What is not found, or found wrong ----------------------------------------------------------------


class Several(TinyModule):
    """Two attentions, neither inside the other."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.second = nn.Linear(4, 1)

    def loss(self, batch):
        weights = torch.softmax(self.second(batch["features"]), dim=1)
        return super().loss(batch) + (weights * batch["features"]).sum(dim=1).square().mean()


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
def test_search__several_attentions__lists_lines_and_each_of_them_pasted_works(tmp_path, callback):
    module = seeded_module(Several)
    with pytest.raises(MisconfigurationException, match="One attention block must be") as error:
        make_trainer(tmp_path, callback()).fit(module, make_loader())
    assert_clean(module)

    lines = re.search(r"Name one: (.*)\.$", str(error.value))[1].split(" or ")

    name = callback.__name__
    assert sorted(lines) == [
        f"{name}({AttentionSite('net.attention', layout='b n r')})",
        f"{name}({AttentionSite('second', layout='b n r')})",
    ]
    for line in lines:
        trainer = make_trainer(tmp_path, _pasted(line))
        trainer.fit(seeded_module(Several), make_loader(), make_loader())
        assert trainer.callback_metrics.keys() & {"anchor/kl", "attention/jsd"}


class NoAttention(TinyModule):
    """Averages its instances."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        small = hidden[..., :1] + self.net.attention(hidden).mean() * 0
        logits = self.net.head((hidden * small.sigmoid()).mean(dim=1))
        return nn.functional.cross_entropy(logits, batch["label"])


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
def test_search__model_without_attention__names_kinds_and_candidates(tmp_path, callback):
    module = seeded_module(NoAttention)

    with pytest.raises(MisconfigurationException, match="of NoAttention must be found") as error:
        make_trainer(tmp_path, callback()).fit(module, make_loader())

    message = str(error.value)
    kinds = ("AttentionSite", "GatedSite", "ClassTokenSite", "MultiheadSite")
    assert all(f"{kind}(" in message for kind in (*kinds, "CriticalInstanceSite"))
    assert "net.attention (2, 5, 8) -> (2, 5, 2)" in message
    assert_clean(module)
    assert not _get_current_dispatch_mode_stack()


class Probabilities(TinyModule):
    """Normalises inside the block that a user might name."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.net.attention.append(nn.Softmax(dim=1))

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        pooled = self.net.attention(hidden).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


class Tempered(TinyModule):
    """Divides its scores by a temperature."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        pooled = torch.softmax(self.net.attention(hidden) / 4, dim=1).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


class MaskedLater(TinyModule):
    """Hides an instance that the batch does not call padding."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        scores = self.net.attention(hidden).index_fill(1, torch.tensor([0]), -torch.inf)
        pooled = torch.softmax(scores, dim=1).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


WRONG = [
    (Probabilities, "they are probabilities"),
    (Tempered, r"multiplies them by 0\.25 .* AttentionSite\(scale=0\.25\)"),
    (MaskedLater, "masks 1 of 5 of them afterwards"),
]


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
@pytest.mark.parametrize(("cls", "why"), WRONG)
def test_proof__wrong_site__is_an_error_in_the_callbacks_own_name(tmp_path, cls, why, callback):
    module = seeded_module(cls)

    with pytest.raises(
        MisconfigurationException,
        match=rf"attention block 'net\.attention' must .*{why}.* {callback.__name__}\(\.\.\., str",
    ):
        make_trainer(tmp_path, callback(SITE)).fit(module, make_loader(), make_loader())
    assert_clean(module)


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
@pytest.mark.parametrize(("cls", "why"), WRONG)
def test_proof__wrong_site_not_strict__warns_once_and_trains_on(tmp_path, cls, why, callback):
    with pytest.warns(UserWarning, match=f"attention block 'net.attention' must .*{why}") as caught:
        run = _train(tmp_path, seeded_module(cls), [callback(SITE, strict=False)], validate=True)

    assert sum("attention block" in str(warning.message) for warning in caught) == 1
    assert len(run) == 13
    assert ("kl" in run[-1]) == (callback is AnchorCallback)


def test_search__temperature__is_found(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run = _train(tmp_path, seeded_module(Tempered), [_plugin()])

    (line,) = _found(caplog)
    assert line == f"AnchorCallback({AttentionSite(BLOCK, layout='b n r', scale=0.25)})"
    again = _train(tmp_path, seeded_module(Tempered), [_pasted(line, weight=0.5, decay=0.9)])
    _assert_same(run, again)


# A name is no proof -------------------------------------------------------------------------------


class ABMIL(TinyMIL):
    """Of a registered name: several published models of it have their scores in `attention`."""


class WithProbabilities(ABMIL):
    """Its block puts out probabilities."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention.append(nn.Softmax(dim=1))

    def forward(self, features):
        hidden = self.encoder(features)
        return self.head((self.attention(hidden).mT @ hidden).mean(dim=1))


class Paired(nn.Sequential):
    def forward(self, hidden):
        return super().forward(hidden), hidden


class WithTuple(ABMIL):
    """Its block puts out scores and features."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention = Paired(*self.attention)

    def forward(self, features):
        scores, hidden = self.attention(self.encoder(features))
        return self.head((scores.softmax(dim=1).mT @ hidden).mean(dim=1))


class Moved(TinyMIL):
    """Its scores come from another submodule; what is called attention does not run."""

    def __init__(self, dropout=0.3) -> None:
        super().__init__(dropout)
        self.scorer = copy.deepcopy(self.attention)

    def forward(self, features):
        hidden = self.encoder(features)
        return self.head((self.scorer(hidden).softmax(dim=1).mT @ hidden).mean(dim=1))


class Elsewhere(Moved, ABMIL):
    """The same, of a registered name."""


class Mixing(ABMIL):
    """What is called attention runs, and mixes the features before they are scored."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention, self.scorer = nn.Linear(8, 8), self.attention

    def forward(self, features):
        hidden = self.attention(self.encoder(features))
        return self.head((self.scorer(hidden).softmax(dim=1).mT @ hidden).mean(dim=1))


class WithoutParameters(ABMIL):
    """What is called attention is only the softmax."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention, self.scorer = nn.Softmax(dim=1), self.attention

    def forward(self, features):
        hidden = self.encoder(features)
        return self.head((self.attention(self.scorer(hidden)).mT @ hidden).mean(dim=1))


MISNAMED = {
    WithProbabilities: AttentionSite(BLOCK, tap="3", layout="b n r"),
    WithTuple: AttentionSite(BLOCK, layout="b n r", output=0),
    Elsewhere: AttentionSite("net.scorer", layout="b n r"),
    Mixing: AttentionSite("net.scorer", layout="b n r"),
    WithoutParameters: AttentionSite("net.scorer", layout="b n r"),
}


class Misnamed(TinyModule):
    def __init__(self, net, *, dropout=0.3) -> None:
        super().__init__(dropout=dropout)
        self.net = net(dropout)


@pytest.mark.parametrize("net", MISNAMED)
def test_search__registered_name_that_does_not_fit__falls_back_to_what_the_model_runs(
    tmp_path, net, caplog
):
    assert mil_anchor.find_site(seeded_module(Misnamed, net=net)) == AttentionSite(BLOCK)

    with caplog.at_level("INFO"):
        found = _train(tmp_path, seeded_module(Misnamed, net=net), [_plugin()])

    (line,) = _found(caplog)
    pasted = _pasted(line, weight=0.5, decay=0.9)
    _assert_same(found, _train(tmp_path, seeded_module(Misnamed, net=net), [pasted]))
    again = _train(tmp_path, seeded_module(Misnamed, net=net), [_plugin(MISNAMED[net])])
    _assert_same(found, again)
    assert found[-1]["kl"] > 0


def test_search__registered_name_that_does_not_fit_and_nothing_else__tells_the_difference(tmp_path):
    class Unnormalized(ABMIL):
        def forward(self, features):
            hidden = self.encoder(features)
            return self.head((self.attention(hidden).mT @ hidden).mean(dim=1))

    module = seeded_module(Misnamed, net=Unnormalized)
    with pytest.raises(MisconfigurationException, match="it ran no softmax over 5 instances"):
        make_trainer(tmp_path, _plugin()).fit(module, make_loader())
    assert_clean(module)


# The monitor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [None, "the subject's"])
def test_monitor__alone__writes_rows_and_trains_as_without(tmp_path, unknown, site):
    batches = unknown.batches()
    monitor = AttentionMonitor(site and unknown.site)
    runs = [
        _train(tmp_path, seeded_module(unknown.module), callbacks, batches=batches, validate=True)
        for callbacks in ([], [monitor])
    ]

    _assert_same(*runs)
    rows = read_attention(tmp_path / "attention.csv")
    assert [row.epoch for row in rows] == [0] * 12 + [1] * 12
    assert [row.jsd is None for row in rows] == [True] * 12 + [False] * 12


def test_monitor__found__writes_the_rows_of_the_named_site(tmp_path, unknown):
    rows = []
    for site in (None, unknown.site):
        _train(
            tmp_path,
            seeded_module(unknown.module),
            [AttentionMonitor(site)],
            batches=unknown.batches(),
            validate=True,
        )
        rows.append(read_attention(tmp_path / "attention.csv"))

    assert rows[0] == rows[1]


def test_monitor__model_without_attention_not_strict__warns_once_and_trains_as_without(tmp_path):
    bare = _train(tmp_path, seeded_module(NoAttention), validate=True)

    with pytest.warns(UserWarning, match="AttentionMonitor writes no rows") as caught:
        run = _train(
            tmp_path, seeded_module(NoAttention), [AttentionMonitor(strict=False)], validate=True
        )

    assert sum("attention" in str(warning.message).lower() for warning in caught) == 1
    _assert_same(bare, run)
    assert read_attention(tmp_path / "attention.csv") == []


@pytest.mark.parametrize("order", [1, -1])
def test_search__plugin_and_monitor__both_find_it(tmp_path, unknown, order, caplog):
    runs = []
    for site in (None, unknown.site):
        with caplog.at_level("INFO"):
            callbacks = [_plugin(site), AttentionMonitor(site)][::order]
            module = seeded_module(unknown.module)
            run = _train(tmp_path, module, callbacks, batches=unknown.batches(), validate=True)
        runs.append((run, read_attention(tmp_path / "attention.csv")))
        assert_clean(module)

    lines = _found(caplog)
    assert {line.partition("(")[0] for line in lines} == {"AnchorCallback", "AttentionMonitor"}
    assert len({line.partition("(")[2] for line in lines}) == 1
    assert len(lines) == 2
    _assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert len(runs[0][1]) == 24


# What a fit leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [None, SITE])
@pytest.mark.parametrize("when", ["before the model", "after the model"])
@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
def test_search__exception_in_the_first_step__leaves_the_module_as_it_was(
    tmp_path, site, when, callback
):
    class Failing(TinyModule):
        def loss(self, batch):
            if when == "after the model":
                super().loss(batch)
            raise KeyError("broken on purpose")

    module = seeded_module(Failing)
    with pytest.raises(KeyError, match="broken on purpose"):
        make_trainer(tmp_path, callback(site)).fit(module, make_loader())

    assert_clean(module)
    assert not _get_current_dispatch_mode_stack()


def test_search__fit_twice__searches_again(tmp_path, unknown, caplog):
    runs = []
    for site in (None, unknown.site):
        module, steps = seeded_module(unknown.module), Steps()
        trainer = make_trainer(tmp_path, _plugin(site), steps, max_epochs=1)
        with caplog.at_level("INFO"):
            trainer.fit(module, make_loader(unknown.batches()))
            assert_clean(module)
            trainer.fit_loop.max_epochs = 2
            trainer.fit(module, make_loader(unknown.batches()))
        assert_clean(module)
        runs.append(steps.states)

    assert len(runs[0]) == 12
    _assert_same(*runs)
    assert len(_found(caplog)) == 2


def test_search__second_model_with_its_attention_elsewhere__is_searched_anew(tmp_path, caplog):
    plugin = _plugin()
    with caplog.at_level("INFO"):
        _train(tmp_path, seeded_module(), [plugin])
        second = _train(tmp_path, seeded_module(Misnamed, net=Moved), [plugin])
        named = _train(tmp_path, seeded_module(Misnamed, net=Moved), [_plugin("net.scorer")])

    assert ["net.scorer" in line for line in _found(caplog)] == [False, True]
    _assert_same(second, named)


def _whole_and_resumed(folder, module, plugin, batches, **options):
    """The last states of an uninterrupted run, and of one that was stopped and resumed."""
    ends = []
    for name, epochs, ckpt_path in (
        ("whole", 4, None),
        ("halves", 2, None),
        ("halves", 4, folder / "halves" / "last.ckpt"),
    ):
        own, online = plugin(), module()
        keeper = ModelCheckpoint(folder / name, save_last=True, save_on_train_epoch_end=True)
        trainer = make_trainer(
            folder,
            own,
            RandomState(),
            keeper,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        trainer.fit(online, make_loader(batches, shuffle=True), ckpt_path=ckpt_path)
        ends.append(
            parameters_of(online)
            | {f"anchor of {k}": v for k, v in own.state_dict()["anchor"].items()}
            | {"random": torch.get_rng_state(), "kl": trainer.callback_metrics["anchor/kl"]}
        )
    return ends[0], ends[2]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_search__stop_and_resume__equals_the_uninterrupted_run(tmp_path, unknown, caplog):
    with caplog.at_level("INFO"):
        whole, resumed = _whole_and_resumed(
            tmp_path, lambda: seeded_module(unknown.module), _plugin, unknown.batches()
        )

    assert_equal_states(whole, resumed)
    assert len(_found(caplog)) == 3


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("net", MISNAMED)
def test_search__stop_and_resume_under_a_name_that_does_not_fit__equals_the_uninterrupted_run(
    tmp_path, net
):
    whole, resumed = _whole_and_resumed(
        tmp_path, lambda: seeded_module(Misnamed, net=net), _plugin, make_batches()
    )

    assert_equal_states(whole, resumed)


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("site", [None, "the subject's"])
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_search__copy_of_the_module_in_the_first_step__is_a_plain_module(
    tmp_path, unknown, copied, site
):
    twins = []

    class Copying(AnchorCallback):
        def observe(self, watch, batch, loss):
            recorder, twin = watch if site is None else self.online, copied(self.module)
            n_calls = len(recorder.calls)
            of_twin = twin.training_step(batch, 0)
            of_twin.backward()
            assert torch.equal(of_twin, loss)
            assert twin.training_step.__self__ is twin
            assert len(recorder.calls) == n_calls > 0
            twins.append(twin)
            return super().observe(watch, batch, loss)

    site = site and unknown.site
    module, undisturbed = (seeded_module(unknown.module, dropout=0.0) for _ in range(2))
    run = _train(
        tmp_path, module, [Copying(site, weight=0.5, decay=0.9)], batches=unknown.batches()
    )

    assert len(twins) == 1
    assert all(
        hook.__name__ == "_idle_hook"
        for part in twins[0].modules()
        for hook in part._forward_hooks.values()
    )
    _assert_same(_train(tmp_path, undisturbed, [_plugin(site)], batches=unknown.batches()), run)


# A kind of one's own ------------------------------------------------------------------------------


class CosineMIL(nn.Module):
    """Attends to instances whose projection points like a learned prototype."""

    def __init__(self, *, temperature=0.2) -> None:
        super().__init__()
        self.project = nn.Linear(4, 6)
        self.prototype = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)
        self.temperature = temperature

    def forward(self, features):
        hidden = self.project(features)
        scores = nn.functional.cosine_similarity(hidden, self.prototype, dim=-1)
        attention = torch.softmax(scores / self.temperature, dim=1)
        return self.head((attention[..., None] * hidden).sum(dim=1))


class CosineModule(Recipe):
    def __init__(self, **options) -> None:
        super().__init__()
        self.net = CosineMIL(**options)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch["features"]), batch["label"])


@dataclass(frozen=True)
class PrototypeSite(Site):
    """Cosine of a projection to a parameter of the model; the anchor mirrors the projection."""

    model: str
    temperature: float = 0.2

    @property
    def path(self):
        return joined(self.model, "project")

    def within(self, prefix):
        return PrototypeSite(joined(prefix, self.model), self.temperature)

    def find_block(self, root):
        return find_submodule(root, self.path)

    def watched(self, root):
        return {"model": find_submodule(root, self.model), "project": self.find_block(root)}

    def read(self, calls, n_bags):
        (model,) = {call.module for call in calls if call.name == "model"}
        return [
            RecordedAttention(
                self._cosine(call.output, model.prototype),
                None,
                (*call.inputs()[0], model.prototype.detach().clone()),
            )
            for call in calls
            if call.name == "project"
        ]

    def rescore(self, block, inputs):
        features, prototype = inputs
        return self._cosine(block(features), prototype)

    def _cosine(self, hidden, prototype):
        cosine = nn.functional.cosine_similarity(hidden, prototype, dim=-1)
        return (cosine / self.temperature).unsqueeze(1)


def test_site__of_the_users_own_kind__is_proven_and_trains_as_by_hand(tmp_path):
    callback = _plugin(PrototypeSite("net"), target="softmax")
    run = _train(tmp_path, seeded_module(CosineModule), [callback], precision="64-true")

    module = seeded_module(CosineModule).double()
    anchor, optimizer = copy.deepcopy(module.net.project), module.configure_optimizers()
    states = []
    for batch in 2 * make_batches():
        features = batch["features"].double()
        target, online = (
            torch.log_softmax(
                nn.functional.cosine_similarity(project(features), prototype, dim=-1) / 0.2, dim=1
            )
            for project, prototype in (
                (anchor, module.net.prototype.detach()),
                (module.net.project, module.net.prototype),
            )
        )
        kl = (target.detach().exp() * (target.detach() - online)).sum(dim=1).mean()
        optimizer.zero_grad()
        (module.loss({**batch, "features": features}) + 0.5 * kl).backward()
        optimizer.step()
        with torch.no_grad():
            for mirrored, own in zip(
                anchor.parameters(), module.net.project.parameters(), strict=True
            ):
                mirrored.mul_(0.9).add_(own, alpha=0.1)
        states.append(
            parameters_of(module)
            | {f"anchor of {name}": value for name, value in parameters_of(anchor).items()}
        )

    for mine, theirs in zip(run[:-1], states, strict=True):
        for name, value in theirs.items():
            assert torch.allclose(mine[name], value, atol=1e-10), name


def test_site__of_the_users_own_kind_that_is_wrong__is_refused(tmp_path):
    module = seeded_module(CosineModule, temperature=0.4)

    with pytest.raises(
        MisconfigurationException, match=r"'net\.project' .*multiplies them by 0\.5"
    ):
        make_trainer(tmp_path, _plugin(PrototypeSite("net"))).fit(module, make_loader())
    assert_clean(module)
