"""The anchor's forward pass in bfloat16."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from mil_anchor import (
    AnchorCallback,
    AttentionSite,
    ClassTokenSite,
    CriticalInstanceSite,
    MultiheadSite,
)
from mil_anchor.anchor import Anchor
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.sites.gated import GatedSite
from mil_anchor.targets import as_target
from tests.callbacks.tiny import (
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

BLOCK = "net.attention"


@pytest.fixture(autouse=True)
def _computes_in_bf16(monkeypatch):
    """Every processor can emulate it: the tests do not need a fast one."""
    monkeypatch.setattr("mil_anchor.precision._has_bf16", lambda device: True)


def _fit(folder, callback, *, epochs=2, **options):
    module = seeded_module(dropout=0.0)
    trainer = make_trainer(folder, callback, max_epochs=epochs)
    trainer.fit(module, make_loader(), **options)
    return module, trainer


@pytest.mark.parametrize("scope", ["block", "encoder"])
def test_anchor_callback__bf16__measures_what_float32_does(tmp_path, scope):
    divergences, states = [], []
    for precision in ("float32", "bf16"):
        # At weight 0 both train alike, and differ in nothing but the forward pass.
        callback = AnchorCallback(
            BLOCK, target="softmax", weight=0.0, decay=0.9, anchor_precision=precision, scope=scope
        )
        _, trainer = _fit(tmp_path, callback)
        divergences.append(trainer.callback_metrics["anchor/kl"])
        states.append(callback.state_dict()["anchor"])

    assert divergences[1].dtype == torch.float32
    assert divergences[0] != divergences[1]
    assert divergences[1].item() == pytest.approx(divergences[0].item(), rel=0.02)
    assert_equal_states(*states)


def test_anchor_callback__bf16__has_a_target_of_bfloat16_digits(tmp_path):
    callback = AnchorCallback(BLOCK, anchor_precision="bf16")
    module, _ = _fit(tmp_path, callback)
    exact = Anchor(module.net.attention)
    rounded = Anchor(module.net.attention, precision="bf16")
    hidden = module.net.encoder(make_batches()[0]["features"])
    target = as_target("nsf")

    one, other = (target(anchor(hidden).mT).exp() for anchor in (exact, rounded))

    assert other.dtype == torch.float32
    assert torch.allclose(other.sum(dim=-1), torch.ones(2, 2))
    assert not torch.equal(one, other)
    assert torch.allclose(one, other, rtol=0.05)


def test_anchor_callback__bf16_at_weight_0__leaves_the_training_as_it_is(tmp_path):
    states = []
    for callbacks in ([], [AnchorCallback(BLOCK, weight=0.0, anchor_precision="bf16")]):
        module = seeded_module()
        make_trainer(tmp_path, *callbacks).fit(module, make_loader())
        states.append(parameters_of(module))

    assert_equal_states(*states)


def test_anchor_callback__checkpoint_of_bf16__goes_on_in_either_precision(tmp_path):
    _, trainer = _fit(tmp_path, AnchorCallback(BLOCK, decay=0.9, anchor_precision="bf16"), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole = AnchorCallback(BLOCK, decay=0.9, anchor_precision="bf16")
    _fit(tmp_path, whole)
    resumed = {}
    for precision in ("bf16", "float32"):
        resumed[precision] = AnchorCallback(BLOCK, decay=0.9, anchor_precision=precision)
        _fit(tmp_path, resumed[precision], ckpt_path=tmp_path / "half.ckpt", weights_only=False)

    assert_equal_states(whole.state_dict()["anchor"], resumed["bf16"].state_dict()["anchor"])
    for name, tensor in whole.state_dict()["anchor"].items():
        assert torch.allclose(resumed["float32"].state_dict()["anchor"][name], tensor, atol=0.02)


def test_anchor_callback__device_without_bf16__is_refused_when_the_fit_starts(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("mil_anchor.precision._has_bf16", lambda device: False)
    callback = AnchorCallback(BLOCK, anchor_precision="bf16")

    with pytest.raises(MisconfigurationException, match=r"computes in bfloat16 itself.*this cpu"):
        _fit(tmp_path, callback)


def test_anchor_callback__unknown_precision__is_named():
    with pytest.raises(ValueError, match=r"anchor_precision must be one of float32, bf16, but got"):
        AnchorCallback(BLOCK, anchor_precision="bf16-mixed")


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid())
        self.score = nn.Linear(6, 2)

    def forward(self, features):
        return self.score(self.value(features) * self.gate(features))


class _Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 2)
        self.query = nn.Sequential(nn.Linear(8, 6), nn.Tanh())

    def forward(self, features):
        self.classifier(features)
        return self.query(features)


class _ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential()
        self.attention.add_module("qkv", nn.Linear(8, 24))

    def forward(self, features):
        return self.attention(features)


class _Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, features):
        return self.attention(features, features, features)[0]


KINDS = {
    "block": (_Gated, AttentionSite("", layout="b n r")),
    "tap": (_Gated, AttentionSite("", tap="score", layout="b n r")),
    "gated": (_Gated, GatedSite("value", "gate", "score")),
    "critical": (_Queries, CriticalInstanceSite("query", classifier="classifier")),
    "class_token": (_ClassToken, ClassTokenSite("attention.qkv", heads=2, squared=False)),
    "multihead": (_Multihead, MultiheadSite("attention", class_token=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_anchor__bf16_with_every_kind_of_site__rescores_by_bfloat16_digits(kind):
    torch.manual_seed(0)
    make, site = KINDS[kind]
    model, features = make(), torch.randn(2, 7, 8)
    recorder = AttentionRecorder(model, site, only_with_grad=True)
    recorder.start()
    model(features)
    (attention,) = recorder.take(None)
    recorder.remove()

    rounded, exact = (
        Anchor(recorder.block, precision=name).apply(recorder.site.rescore, attention.inputs)
        for name in ("bf16", "float32")
    )

    assert torch.allclose(exact, attention.scores, atol=1e-6)
    assert not torch.equal(rounded.float(), exact)
    assert torch.allclose(rounded.float(), exact, rtol=0.05, atol=0.05)
