import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from mil_anchor.data.bags import Bag, collate_bags
from mil_anchor.experiment import run
from mil_anchor.module import MILModule
from mil_anchor.torchmil import TorchMIL
from tests.composing import ROOT, composed

OPTIONS = {
    "ABMIL": {"att_dim": 8, "gated": True},
    "CLAM_SB": {"att_dim": 8, "k_sample": 2},
    "DSMIL": {"att_dim": 8},
    "DTFDMIL": {"att_dim": 8, "n_groups": 2},
    "TransformerABMIL": {"pool_att_dim": 8, "transf_att_dim": 16},
    "TransMIL": {"att_dim": 16},
    "IIBMIL": {"att_dim": 16},
}
CHOICES = sorted(file.stem for file in (ROOT / "conf/model").glob("torchmil_*.yaml"))


def _model(name, seed=0):
    torch.manual_seed(seed)
    return TorchMIL(6, 2, name=name, options=OPTIONS[name])


def _batch(*lengths):
    generator = torch.Generator().manual_seed(1)
    return collate_bags(
        [
            Bag(torch.randn(length, 6, generator=generator), index % 2, f"bag{index}")
            for index, length in enumerate(lengths)
        ]
    )


def _reseeded(function, *arguments, **options):
    """DTFD draws its groups from numpy's global generator."""
    np.random.seed(0)  # noqa: NPY002
    return function(*arguments, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_torchmil__training__has_the_loss_and_gradients_of_the_library(name):
    ours, theirs = MILModule(_model(name), n_classes=2), _model(name).model
    batch = _batch(9, 9)
    mask = {} if name == "TransMIL" else {"mask": batch["mask"]}

    loss = _reseeded(ours.training_step, batch, 0)
    _, losses = _reseeded(theirs.compute_loss, batch["label"], batch["features"], **mask)

    expected = sum(losses.values())
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for own, other in zip(ours.model.model.parameters(), theirs.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)


def test_torchmil__clam__trains_with_the_smooth_svm_of_its_paper():
    model = _model("CLAM_SB")
    with torch.no_grad():  # with classifiers as sure as these, the library's own loss fails
        for classifier in model.model.inst_classifiers:
            classifier.module.weight.mul_(50)
    batch = _batch(5)
    features, label = batch["features"][0], batch["label"][0]

    output = model(batch["features"], batch["mask"], batch["label"])

    logits, scores = model.model(batch["features"], return_att=True)
    order = scores[0].argsort(descending=True).tolist()
    top, bottom = order[:2], order[-2:]

    def mean_loss(own, instances, targets):
        losses = []
        for instance, target in zip(instances, targets, strict=True):
            x = model.model.inst_classifiers[own](features[instance])
            losses.append(torch.log(1 + torch.exp(1 + x[1 - target] - x[target])))
        return sum(losses) / len(losses)

    expected = (
        F.binary_cross_entropy_with_logits(logits, batch["label"].float())
        + mean_loss(label, top + bottom, [1, 1, 0, 0])
        + mean_loss(1 - label, top, [0, 0])
    )
    assert torch.allclose(output.auxiliary_loss, expected)


def test_torchmil__instance_losses__are_part_of_training():
    n_losses = {}
    for name in OPTIONS:
        batch = _batch(9)
        model = _model(name)
        output = _reseeded(model, **{key: batch[key] for key in ("features", "mask", "label")})
        bag_loss = F.binary_cross_entropy_with_logits(
            _reseeded(model, batch["features"]).logits, batch["label"].float()
        )
        n_losses[name] = 1 if torch.allclose(output.auxiliary_loss, bag_loss) else 2

    assert {name for name, number in n_losses.items() if number == 2} == {
        "CLAM_SB",
        "DSMIL",
        "DTFDMIL",
        "IIBMIL",
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_torchmil__evaluation__predicts_from_the_bag_logit(name):
    module = MILModule(_model(name), n_classes=2).eval()
    batch = _batch(7)

    _reseeded(module.validation_step, batch, 0)

    logit = _reseeded(module.model, batch["features"]).logits
    assert logit.shape == (1,)
    (prediction,) = module.predictions
    assert prediction.probabilities == pytest.approx(
        [1 - logit.sigmoid().item(), logit.sigmoid().item()]
    )


# DSMIL's critical instance may be padding, and DTFD deals padding into its groups.
@pytest.mark.parametrize("name", ["ABMIL", "CLAM_SB", "TransformerABMIL", "IIBMIL"])
def test_torchmil__padded_bag__has_the_unpadded_bags_result(name):
    model = _model(name).eval()
    batch = _batch(9, 4, 6)
    batch["features"][~batch["mask"]] = 50.0

    padded = model(batch["features"], batch["mask"]).logits

    for index, length in enumerate((9, 4, 6)):
        alone = model(batch["features"][index : index + 1, :length]).logits
        assert torch.allclose(padded[index], alone[0], atol=1e-6)


def test_torchmil__padded_batch_for_a_model_without_mask__is_refused():
    batch = _batch(9, 4)

    with pytest.raises(ValueError, match=r"TransMIL takes no mask, .* padded\. Set data\.batch_s"):
        _model("TransMIL")(batch["features"], batch["mask"])


def test_torchmil__submodule_hooks__fire_in_training_and_evaluation():
    model = _model("CLAM_SB")
    calls = []
    model.model.pool.register_forward_hook(lambda *_: calls.append(1))
    batch = _batch(9)

    model(batch["features"], batch["mask"], batch["label"])
    model(batch["features"], batch["mask"])

    assert len(calls) == 2


def test_torchmil__two_models__share_no_module():
    first, second = _model("ABMIL"), _model("ABMIL")

    # The library's defaults for feat_ext and criterion are one object each.
    assert not set(first.modules()) & set(second.modules())
    first.eval()
    assert all(module.training for module in second.modules())


@pytest.mark.parametrize(
    ("n_classes", "name", "options", "message"),
    [
        (3, "ABMIL", {}, "2 classes apart, but the data has 3"),
        (2, "ABMLI", {}, "no 'ABMLI'. It has: ABMIL, TransformerABMIL"),
        (2, "MILModelWrapper", {}, "no 'MILModelWrapper'"),
        (2, "ABMIL", {"gatd": True}, "unexpected keyword argument 'gatd'. It takes: in_shape, att"),
        (2, "ABMIL", {"in_shape": 3}, "multiple values for keyword argument 'in_shape'"),
        (2, "VAEABMIL", {}, "missing a required argument: 'feat_ext'"),
        (2, "SmABMIL", {}, r"SmABMIL needs \['adj'\]"),
        (2, "SETMIL", {}, r"SETMIL needs \['coords'\]"),
    ],
)
def test_torchmil__what_it_cannot_build__is_named(n_classes, name, options, message):
    with pytest.raises(ValueError, match=message):
        TorchMIL(6, n_classes, name=name, options=options)


def test_torchmil__not_installed__says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmil", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[torchmil\]'"):
        TorchMIL(6, 2, name="ABMIL")


def _run(folder, *overrides):
    quiet = ("trainer.enable_progress_bar=false", "trainer.max_epochs=1", "hidden=16")
    return run(composed(*quiet, *overrides, folder=folder))


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.filterwarnings(
    "ignore:The attention of evaluated bags is not recorded.*whole bags"
)  # DTFD's groups
def test_run__torchmil_model_with_the_plugin__trains_and_is_tested(tmp_path, choice):
    metrics = _run(tmp_path, f"model={choice}", "plugin=anchor_nsf", "data=musk1")

    assert metrics["model"] == choice
    assert 0 <= metrics["test/auroc"] <= 1
    (logged,) = tmp_path.glob("logs/**/metrics.csv")
    assert "anchor/kl" in logged.read_text()


def test_run__misspelled_torchmil_option__is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    model = {"_target_": "mil_anchor.torchmil.TorchMIL", "name": "ABMIL", "options": {"gatd": 1}}
    (tmp_path / "model/typo.yaml").write_text(yaml.safe_dump(model))

    with pytest.raises(Exception, match="unexpected keyword argument 'gatd'"):
        _run(tmp_path / "run", "model=typo", f"hydra.searchpath=[file://{tmp_path}]")
