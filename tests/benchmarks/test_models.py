import pytest
import torch

from benchmarks.models import OURS, SUBJECTS, bag_for, fit_of, module_of
from mil_anchor import AnchorCallback

N_INSTANCES = 40


@pytest.mark.parametrize("name", SUBJECTS)
def test_fit_of__each_model__steps_and_learns(name):
    batch = bag_for(name, N_INSTANCES)
    with fit_of(name, batch) as fit:
        fit.step()


@pytest.mark.parametrize("name", [*OURS, "torchmil ABMIL 1024-512-128", "torchmil TransMIL 1024"])
def test_fit_of__plugin__finds_the_attention(name):
    with fit_of(name, bag_for(name, N_INSTANCES), callbacks=[AnchorCallback()]) as fit:
        fit.step()
        fit.step()


@pytest.mark.parametrize(
    ("ours", "peer"),
    [
        ("ABMIL 1024-512-128", "textbook ABMIL 1024-512-128"),
        ("ABMIL 384-128-128", "textbook ABMIL 384-128-128"),
        ("DSMIL 1024", "textbook DSMIL 1024"),
    ],
)
def test_textbook__our_weights__gives_our_logits_and_loss(ours, peer):
    mine, other = (module_of(name).model.double() for name in (ours, peer))
    for parameter, source in zip(other.parameters(), mine.parameters(), strict=True):
        parameter.data.copy_(source.data)
    features, label = torch.randn(1, N_INSTANCES, SUBJECTS[ours].width).double(), torch.tensor([1])
    expected = mine(features, label=label)
    if ours.startswith("ABMIL"):
        torch.testing.assert_close(other(features), expected.logits)
    else:
        output = other(features, label=label)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.auxiliary_loss, expected.auxiliary_loss)


def test_upstream_transmil__our_weights__gives_our_logits():
    mine, other = (
        module_of(name).model.double().eval()
        for name in ("TransMIL 1024", "upstream TransMIL 1024")
    )
    weights = {
        key.replace("layers.0", "first").replace("layers.1", "second"): value
        for key, value in mine.state_dict().items()
    }
    for layer in ("first", "second"):
        # The order of queries, keys and values.
        parts = ("query_key.to_q", "query_key.to_k", "to_v")
        rows = [weights.pop(f"{layer}.attention.{part}.weight") for part in parts]
        weights[f"{layer}.attention.to_qkv.weight"] = torch.cat(rows)
    other.load_state_dict(weights)
    features = torch.randn(1, 300, 1024).double()
    torch.testing.assert_close(other(features), mine(features).logits)


def test_bag_for__another_call__draws_the_same_bag():
    one, other = (bag_for("DSMIL 1024", N_INSTANCES)["features"] for _ in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
