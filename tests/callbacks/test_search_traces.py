"""What search and proof leave behind: rows of the monitor, and nothing else."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mil_anchor import AnchorCallback, AttentionMonitor, Site
from mil_anchor.callbacks.monitor import read_attention
from mil_anchor.sites.base import RecordedAttention, find_submodule, joined
from tests.callbacks.searching import (
    SITE,
    Steps,
    anchor_plugin,
    assert_same,
    found_lines,
    train,
    whole_and_resumed,
)
from tests.callbacks.tiny import (
    Recipe,
    TinyModule,
    assert_clean,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)


@pytest.mark.parametrize("site", [None, "the subject's"])
def test_monitor__alone__writes_rows_and_trains_as_without(tmp_path, unknown, site):
    batches = unknown.batches()
    monitor = AttentionMonitor(site and unknown.site)
    runs = [
        train(tmp_path, seeded_module(unknown.module), callbacks, batches=batches, validate=True)
        for callbacks in ([], [monitor])
    ]

    assert_same(*runs)
    rows = read_attention(tmp_path / "attention.csv")
    assert [row.epoch for row in rows] == [0] * 12 + [1] * 12
    assert [row.jsd is None for row in rows] == [True] * 12 + [False] * 12


def test_monitor__found__writes_the_rows_of_the_named_site(tmp_path, unknown):
    rows = []
    for site in (None, unknown.site):
        train(
            tmp_path,
            seeded_module(unknown.module),
            [AttentionMonitor(site)],
            batches=unknown.batches(),
            validate=True,
        )
        rows.append(read_attention(tmp_path / "attention.csv"))

    assert rows[0] == rows[1]


@pytest.mark.parametrize("order", [1, -1])
def test_search__plugin_and_monitor__both_find_it(tmp_path, unknown, order, caplog):
    runs = []
    for site in (None, unknown.site):
        with caplog.at_level("INFO"):
            callbacks = [anchor_plugin(site), AttentionMonitor(site)][::order]
            module = seeded_module(unknown.module)
            run = train(tmp_path, module, callbacks, batches=unknown.batches(), validate=True)
        runs.append((run, read_attention(tmp_path / "attention.csv")))
        assert_clean(module)

    lines = found_lines(caplog)
    assert {line.partition("(")[0] for line in lines} == {"AnchorCallback", "AttentionMonitor"}
    assert len({line.partition("(")[2] for line in lines}) == 1
    assert len(lines) == 2
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert len(runs[0][1]) == 24


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
        trainer = make_trainer(tmp_path, anchor_plugin(site), steps, max_epochs=1)
        with caplog.at_level("INFO"):
            trainer.fit(module, make_loader(unknown.batches()))
            assert_clean(module)
            trainer.fit_loop.max_epochs = 2
            trainer.fit(module, make_loader(unknown.batches()))
        assert_clean(module)
        runs.append(steps.states)

    assert len(runs[0]) == 12
    assert_same(*runs)
    assert len(found_lines(caplog)) == 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_search__stop_and_resume__equals_the_uninterrupted_run(tmp_path, unknown, caplog):
    with caplog.at_level("INFO"):
        whole, resumed = whole_and_resumed(
            tmp_path, lambda: seeded_module(unknown.module), anchor_plugin, unknown.batches()
        )

    assert_equal_states(whole, resumed)
    assert len(found_lines(caplog)) == 3


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
    run = train(tmp_path, module, [Copying(site, weight=0.5, decay=0.9)], batches=unknown.batches())

    assert len(twins) == 1
    assert all(
        hook.__name__ == "_idle_hook"
        for part in twins[0].modules()
        for hook in part._forward_hooks.values()
    )
    assert_same(train(tmp_path, undisturbed, [anchor_plugin(site)], batches=unknown.batches()), run)


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
    callback = anchor_plugin(PrototypeSite("net"), target="softmax")
    run = train(tmp_path, seeded_module(CosineModule), [callback], precision="64-true")

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
        make_trainer(tmp_path, anchor_plugin(PrototypeSite("net"))).fit(module, make_loader())
    assert_clean(module)
