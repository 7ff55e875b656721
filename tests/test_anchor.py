import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mil_anchor.anchor import Anchor


class Scorer(nn.Module):
    def __init__(self, wrap=lambda linear: linear) -> None:
        super().__init__()
        self.hidden = wrap(nn.Linear(6, 5))
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(5, 1)

    def forward(self, features):
        return self.out(self.drop(self.norm(self.hidden(features))))


def _perturb(block: nn.Module, size: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(size * torch.randn_like(parameter))


WRAPS = {
    "plain": lambda linear: linear,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_spectral_norm": torch.nn.utils.spectral_norm,
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.3),
}
if hasattr(torch.nn.utils, "weight_norm"):
    WRAPS["old_weight_norm"] = pytest.param(
        torch.nn.utils.weight_norm,
        marks=pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
    )


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_anchor__before_the_first_update__equals_the_online_block_in_evaluation(wrap):
    torch.manual_seed(0)
    block = Scorer(wrap)
    features = torch.randn(9, 6)
    block(features).sum().backward()  # leaves non-leaf attributes behind

    anchor = Anchor(block)

    assert torch.equal(anchor(features), block.eval()(features))


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_anchor__after_k_updates__equals_the_closed_form(wrap):
    torch.manual_seed(0)
    block, decay, k = Scorer(wrap).double(), 0.9, 7
    anchor = Anchor(block, decay=decay)
    history = [[p.detach().clone() for p in block.parameters()]]

    for _ in range(k):
        _perturb(block)
        block(torch.randn(4, 6, dtype=torch.float64))
        anchor.update()
        history.append([p.detach().clone() for p in block.parameters()])

    for index, mirrored in enumerate(anchor.block.parameters()):
        expected = decay**k * history[0][index]
        for step in range(1, k + 1):
            expected = expected + (1 - decay) * decay ** (k - step) * history[step][index]
        assert torch.allclose(mirrored, expected, rtol=1e-12)
    for copied, buffer in zip(anchor.block.buffers(), block.buffers(), strict=True):
        assert torch.equal(copied, buffer)
    # What the mirror computes follows from what it holds: no weight is left over from its making.
    twin = Scorer(wrap).double()
    twin.load_state_dict(anchor.block.state_dict())
    features = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(anchor(features), twin.eval()(features), rtol=1e-10)


def test_anchor__integer_buffer__is_copied():
    block = Scorer()
    anchor = Anchor(block)
    block(torch.randn(4, 6))
    anchor.update()

    assert anchor.block.norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anchor__half_precision_block__still_moves_in_float32(dtype):
    block = nn.Linear(3, 1).to(dtype)
    with torch.no_grad():
        block.weight.fill_(1)
    anchor = Anchor(block, decay=0.999)
    with torch.no_grad():
        block.weight.fill_(2)

    for _ in range(100):
        anchor.update()

    assert anchor.block.weight.dtype == torch.float32
    assert torch.allclose(anchor.block.weight, torch.tensor(2 - 0.999**100), rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert anchor(torch.ones(2, 3, dtype=dtype)).dtype == torch.float32


def test_anchor__tied_weights__stay_tied_and_move_once():
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    block[1].weight = block[0].weight
    anchor = Anchor(block, decay=0.5)
    before = block[0].weight.detach().clone()
    _perturb(block)
    anchor.update()

    assert anchor.block[1].weight is anchor.block[0].weight
    assert torch.allclose(anchor.block[0].weight, (before + block[0].weight) / 2)


def test_anchor__mirror__has_no_hooks_no_gradient_and_draws_no_random_numbers():
    block = Scorer()
    calls = []
    for register in (
        block.register_forward_hook,
        block.out.register_forward_pre_hook,
        block.out.register_full_backward_hook,
    ):
        register(lambda *_: calls.append(1))
    features = torch.randn(5, 6, requires_grad=True)

    anchor = Anchor(block)
    state = torch.get_rng_state()
    output = anchor(features)

    assert calls == []
    assert torch.equal(state, torch.get_rng_state())
    assert not output.requires_grad
    assert not any(parameter.requires_grad for parameter in anchor.block.parameters())
    block(features)
    assert len(calls) == 2


def test_anchor__bound_method_as_hook__does_not_drag_its_owner_along():
    class Owner:
        def __deepcopy__(self, memo):
            raise AssertionError("the owner of a hook must not be copied")

        def hook(self, *_):
            return None

    block = Scorer()
    block.register_forward_hook(Owner().hook)

    Anchor(block)


def test_anchor__block_that_stores_its_last_attention__can_be_copied():
    class Storing(nn.Linear):
        def forward(self, features):
            self.last = {"maps": [super().forward(features)]}
            return self.last["maps"][0]

    block = Storing(3, 1)
    block(torch.randn(4, 3))

    assert not Anchor(block).block.last["maps"][0].requires_grad
    assert block.last["maps"][0].requires_grad


def test_anchor__lazy_block__asks_for_a_forward_pass():
    block = nn.LazyLinear(2)

    with pytest.raises(ValueError, match="Run one forward pass first"):
        Anchor(block)
    block(torch.randn(1, 3))
    assert torch.equal(Anchor(block).block.weight, block.weight)


def test_anchor__chosen_parameters__are_the_only_ones_that_move():
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    anchor = Anchor(block, decay=0.0)
    before = anchor.block[1].weight.clone()
    _perturb(block)

    anchor.update(list(block[0].parameters()))

    assert torch.equal(anchor.block[0].weight, block[0].weight)
    assert torch.equal(anchor.block[1].weight, before)


def test_anchor__saved_and_loaded__is_the_same():
    block = Scorer()
    anchor = Anchor(block)
    _perturb(block)
    anchor.update()
    state = anchor.state_dict()

    other = Anchor(block)
    other.load_state_dict(state)

    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    features = torch.randn(3, 6)
    assert torch.equal(other(features), anchor(features))


def test_anchor__state_of_another_block__is_refused():
    with pytest.raises(ValueError, match=r"of another shape: \['bias', 'weight'\]"):
        Anchor(nn.Linear(2, 1)).load_state_dict(Anchor(nn.Linear(3, 2)).state_dict())
    with pytest.raises(ValueError, match=r"missing, unknown .* \['bias'\]"):
        Anchor(nn.Linear(2, 1)).load_state_dict(Anchor(nn.Linear(2, 1, bias=False)).state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_anchor__decay_out_of_range__is_named(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), but got"):
        Anchor(nn.Linear(1, 1), decay=decay)
