"""Every model of the tables x {discovery, site, proof, training, anchor equals closed form}."""

import copy
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

import mil_anchor
from mil_anchor import AnchorCallback
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.callbacks.watch import StepWatch
from mil_anchor.sites.discovery import discover
from mil_anchor.sites.proof import find_difference
from mil_anchor.sites.registry import known_site
from tests.callbacks.tiny import assert_equal_states, make_loader, make_trainer
from tests.models.case import make_batch
from tests.models.libraries import LIBRARIES
from tests.models.traps import TRAPS

CASES = [*TRAPS, *LIBRARIES]
HEAVY = "monai_att_trans_pyramid"  # 43 million parameters
DECAY = 0.8
# The published names of the classes that are rebuilt here.
PUBLISHED = {
    "amlab_attention": "Attention",
    "amlab_gated_attention": "GatedAttention",
    "clam_sb": "CLAM_SB",
    "clam_sb_ungated": "CLAM_SB",
    "clam_mb": "CLAM_MB",
    "mhim_clam_sb": "CLAM_SB",
    "mhim_dattention": "DAttention",
    "acmil_abmil": "ABMIL",
    "aem_acmil": "ACMIL",
    "acmil_ga": "ACMIL_GA",
    "acmil_mha": "MHA",
    "acmil_acmil_mha": "ACMIL_MHA",
    "acmil_ibmil": "IBMIL",
    "acmil_clam_mb_softmax_one": "CLAM_MB",
    "acmil_ilra": "ILRA",
    "attmil_attention_gated": "AttentionGated",
    "millab_abmil": "ABMIL",
    "millab_clamsb": "CLAMSB",
    "millab_dftd": "DFTD",
    "millab_rrtmil": "RRTMIL",
    "millab_wikgmil": "WIKGMIL",
    "millab_transmil": "TransMIL",
    "millab_transformer": "Transformer",
    "millab_ilra": "ILRA",
    "millab_dsmil": "DSMIL",
    "slideflow_attention_mil": "Attention_MIL",
    "slideflow_multimodal": "MultiModal_Attention_MIL",
    "owkin_abmil": "ABMIL",
    "transmil": "TransMIL",
    "dsmil": "MILNet",
}


def _params(cases):
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name == HEAVY))
        for case in cases
    ]


every_case = pytest.mark.parametrize("case", _params(CASES))


def _site(case):
    return eval(case.site, vars(mil_anchor))


def _build(case):
    torch.manual_seed(0)
    return case.build().train()


def _watched(case, site=None):
    """One training forward under the watch: the model, its batch, what was read, the rest."""
    model, batch = _build(case), make_batch(case, seed=1)
    recorder = AttentionRecorder(model, site or _site(case), only_with_grad=True)
    watch = StepWatch(model)
    watch.watch_calls()
    with watch:
        recorder.start()
        loss = case.loss(model, batch)
        read = recorder.look(batch)
        difference = find_difference(recorder.site, read, watch.seen)
        try:
            found = discover(model, watch.calls, watch.seen, loss=loss, n_bags=case.n_bags)
        except ValueError as error:
            found = error
    return model, batch, read, difference, found


def _assert_same_scores(case, batch, scores, masks, expected):
    assert len(scores) == len(expected)
    for own, mask, oracle in zip(scores, masks, expected, strict=True):
        assert own.shape == oracle.shape
        real = torch.ones_like(oracle[:, 0], dtype=torch.bool) if mask is None else mask
        assert torch.allclose(
            own.transpose(1, 2)[real].double(), oracle.transpose(1, 2)[real].double(), atol=1e-5
        )


@every_case
def test_site__of_any_model__reads_the_scores_of_the_formula(case):
    model, batch, read, _, _ = _watched(case)

    scores = [attention.scores.detach() for attention in read]
    _assert_same_scores(case, batch, scores, [a.mask for a in read], case.scores(model, batch))
    if case.padded and all(a.scores.shape[-1] == case.n_instances for a in read):
        assert all(torch.equal(attention.mask, batch["mask"]) for attention in read)


@every_case
def test_proof__of_any_model__accepts_what_its_softmax_gets_and_nothing_else(case):
    _, _, _, difference, _ = _watched(case)

    assert (difference is None) == (case.plain and case.proven), difference


@every_case
def test_discovery__of_any_model__finds_the_block_or_says_that_it_cannot(case):
    model, batch, _, _, found = _watched(case)

    if case.found is None:
        assert isinstance(found, ValueError)
        assert re.search(r"must be found|must be meant", str(found))
        return
    assert found.path == case.found
    _, _, read, difference, _ = _watched(case, found)
    assert (difference is None) == case.plain
    scores = [attention.scores.detach() for attention in read]
    _assert_same_scores(case, batch, scores, [a.mask for a in read], case.scores(model, batch))


@pytest.mark.parametrize("case", _params(case for case in TRAPS if case.name in PUBLISHED))
def test_registry__class_of_the_published_name__has_the_site(case):
    model = _build(case)
    inner = model.model if hasattr(model, "model") else model
    inner.__class__ = type(PUBLISHED[case.name], (type(inner),), {})

    site, _ = known_site(model)

    block = _site(case).find_block(model)
    assert [id(p) for p in site.find_block(model).parameters()] == [
        id(p) for p in block.parameters()
    ]
    _, batch, read, _, _ = _watched(case, site)
    scores = [attention.scores.detach() for attention in read]
    _assert_same_scores(case, batch, scores, [a.mask for a in read], case.scores(model, batch))


@pytest.mark.parametrize("case", _params(LIBRARIES))
def test_registry__installed_library__has_the_site(case):
    model = _build(case)

    site, _ = known_site(model)

    assert site is not None
    assert [id(p) for p in site.find_block(model).parameters()] == [
        id(p) for p in _site(case).find_block(model).parameters()
    ]


class Trained(LightningModule):
    def __init__(self, case) -> None:
        super().__init__()
        self.net = _build(case)
        self.case = case

    def training_step(self, batch, batch_idx):
        return self.case.loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Trajectory(Callback):
    """The model's parameters before the first and after each step, and the site in use."""

    def __init__(self, plugin) -> None:
        self.plugin = plugin
        self.states = []
        self.site = None

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.site = self.plugin.online.site if self.states else None
        self.states.append({k: v.detach().clone() for k, v in pl_module.net.state_dict().items()})


def _plugin(case):
    """As its user would: no argument where the model is known or found, else its one line."""
    is_library = case in LIBRARIES
    site = None if case.found is not None or is_library else _site(case).within("net")
    return AnchorCallback(site, weight=0.1, decay=DECAY, strict=case.plain)


@every_case
@pytest.mark.filterwarnings("ignore:The scores of attention block")
def test_anchor_callback__five_steps_on_any_model__has_the_closed_form_anchor(case, tmp_path):
    module, plugin = Trained(case), _plugin(case)
    trajectory = Trajectory(plugin)
    batches = [make_batch(case, seed) for seed in range(5)]
    trainer = make_trainer(tmp_path, plugin, trajectory, max_epochs=1)

    trainer.fit(module, make_loader(batches))

    assert trainer.callback_metrics["anchor/kl"] >= 0
    states = trajectory.states
    assert len(states) == 6
    steps = len(states) - 1
    weights = [DECAY**steps] + [(1 - DECAY) * DECAY ** (steps - k) for k in range(1, steps + 1)]
    mirrored = {id(p) for p in trajectory.site.find_block(module).parameters()}
    names = [name for name, p in module.net.named_parameters() if id(p) in mirrored]
    expected = {
        name: sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        for name in names
    }
    own = [p.double() for p in plugin.anchor.block.parameters()]
    assert len(own) == len(names)
    for name, parameter in zip(names, own, strict=True):
        assert torch.allclose(parameter, expected[name], atol=1e-6), name
    assert any(not torch.equal(states[0][name], states[-1][name]) for name in names)

    # The anchor's scores are those of the formula with these weights.
    model, batch = module.eval(), make_batch(case, seed=9)
    recorder = AttentionRecorder(model, trajectory.site, only_with_grad=False)
    recorder.start()
    case.loss(model.net, batch)
    read = recorder.take(batch)
    recorder.remove()
    scores = [plugin.anchor.apply(recorder.site.rescore, attention.inputs) for attention in read]
    averaged = copy.copy(states[-1]) | {name: value.float() for name, value in expected.items()}
    twin = case.build().eval()
    twin.load_state_dict(averaged)
    _assert_same_scores(case, batch, scores, [a.mask for a in read], case.scores(twin, batch))


@every_case
@pytest.mark.filterwarnings("ignore:The scores of attention block")
def test_anchor_callback__weight_0_on_any_model__trains_bit_for_bit_as_without(case, tmp_path):
    states = []
    for plugins in ([], [_plugin(case)]):
        for plugin in plugins:
            plugin.weight = 0.0
        module, batches = Trained(case), [make_batch(case, seed) for seed in range(3)]
        trainer = make_trainer(tmp_path, *plugins, max_epochs=1)
        trainer.fit(module, make_loader(batches))
        states.append({**module.net.state_dict(), "random": torch.get_rng_state()})

    assert trainer.callback_metrics["anchor/kl"] >= 0
    assert_equal_states(*states)


def test_matrix__is_as_large_as_promised():
    assert len(CASES) >= 30
    assert len({case.name for case in CASES}) == len(CASES)
    by_kind = {case.site.partition("(")[0] for case in CASES}
    kinds = {"GatedSite", "ClassTokenSite", "MultiheadSite", "CriticalInstanceSite"}
    assert by_kind == kinds | {"AttentionSite"}
