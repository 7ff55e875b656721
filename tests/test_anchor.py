import math

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


@pytest.mark.parametrize("k", [1, 5, 9, 30])
def test_anchor__after_k_updates_with_warmup__has_moved_by_the_closed_form(k):
    # (1 + t) / (10 + t) stays below a decay of .5 for t < 8 and equals it at t = 8: of the way, k
    # updates leave 9! k! / (k + 9)!, and halve it from there on.
    block = nn.Linear(3, 2).double()
    anchor = Anchor(block, decay=0.5, warmup=True)
    before = block.weight.detach().clone()
    _perturb(block, 1.0)
    for _ in range(k):
        anchor.update()

    n_warm = min(k, 9)
    left = math.factorial(9) * math.factorial(n_warm) / math.factorial(n_warm + 9)
    left *= 0.5 ** (k - n_warm)
    expected = left * before + (1 - left) * block.weight
    assert anchor.n_updates == k
    assert torch.allclose(anchor.block.weight, expected, rtol=1e-12)


def test_anchor__warmup_that_never_reaches_the_decay__has_only_the_factorials():
    block = nn.Linear(1, 1).double()
    anchor = Anchor(block, decay=0.999, warmup=True)
    _perturb(block, 1.0)
    gap = (anchor.block.weight - block.weight).item()
    for _ in range(20):
        anchor.update()

    left = math.factorial(9) * math.factorial(20) / math.factorial(29)
    assert (anchor.block.weight - block.weight).item() == pytest.approx(left * gap, rel=1e-9)


def test_anchor__distance__is_zero_for_a_copy_and_the_relative_length_of_the_gap():
    block = Scorer().double()
    anchor = Anchor(block)
    assert anchor.distance() == 0
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(4)

    assert anchor.distance().item() == pytest.approx(3 / 4, rel=1e-12)
    with torch.no_grad():
        block.norm.running_mean.add_(9)  # no parameter
    assert anchor.distance().item() == pytest.approx(3 / 4, rel=1e-12)


def test_anchor__distance__equals_the_naive_one_in_half_precision_too():
    block = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).bfloat16()
    anchor = Anchor(block)
    _perturb(block)

    one = torch.cat([p.flatten() for p in anchor.block.parameters()]).double()
    other = torch.cat([p.flatten() for p in block.parameters()]).double()
    assert anchor.distance().dtype == torch.float32
    assert anchor.distance().item() == pytest.approx(
        ((one - other).norm() / other.norm()).item(), rel=1e-5
    )


def _random_parts():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "heads": nn.MultiheadAttention(6, 2),
            "norm": nn.BatchNorm1d(6),
            "nested": nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 2))),
        }
    )


def test_anchor__random_start__is_another_block_and_leaves_no_trace():
    torch.manual_seed(0)
    block = _random_parts()
    _perturb(block)
    held = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    state = torch.get_rng_state()
    anchor = Anchor(block, start="random")

    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, held[name]), name
    for (name, mirrored), online in zip(
        anchor.block.named_parameters(), block.parameters(), strict=True
    ):
        assert not torch.equal(mirrored, online), name
        assert not mirrored.requires_grad
    assert anchor.distance() > 0.5
    assert not anchor.block.training


def test_anchor__random_start__follows_the_seed_alone():
    block = _random_parts()

    def start(seed):
        torch.manual_seed(seed)
        return Anchor(block, start="random").state_dict()

    one, again, other = start(3), start(3), start(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["linear.weight"], other["linear.weight"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 5),
        lambda: nn.MultiheadAttention(6, 2),
        lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=4),
        lambda: nn.BatchNorm1d(4),
        lambda: nn.LSTM(3, 4),
    ],
    ids=["linear", "attention", "attention_of_three_widths", "batch_norm", "lstm"],
)
def test_anchor__random_start__is_what_the_constructor_draws(make):
    block = make()
    _perturb(block)
    torch.manual_seed(5)
    anchor = Anchor(block, start="random")

    torch.manual_seed(int(torch.randint(2**62, ())))
    fresh = make()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(anchor.block.state_dict()[name], tensor), name


def test_anchor__random_start_right_after_the_seed_of_the_model__is_another_block():
    torch.manual_seed(0)
    block = nn.Linear(6, 5)
    torch.manual_seed(0)

    assert Anchor(block, start="random").distance() > 0.5


def test_anchor__random_start_of_a_half_precision_block__is_drawn_in_float32():
    block = nn.Linear(64, 64)
    torch.manual_seed(0)
    whole = Anchor(block, start="random").block.weight
    torch.manual_seed(0)
    half = Anchor(block.bfloat16(), start="random").block.weight

    assert torch.equal(whole, half)
    # The law of nn.Linear: uniform up to 1 / sqrt(width).
    assert whole.abs().max() <= 1 / 8
    assert whole.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_anchor__random_start_of_parts_that_cannot_be_drawn_again__names_them():
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.token = nn.Parameter(torch.zeros(2))

    with pytest.raises(ValueError, match=r"there is none in Token 'own'\. Write one"):
        Anchor(nn.ModuleDict({"own": Token()}), start="random")
    with pytest.raises(ValueError, match=r"there is none in Token\. Write one"):
        Anchor(Token(), start="random")
    with pytest.raises(ValueError, match=r"ParametrizationList 'hidden\.parametrizations\.weight'"):
        Anchor(Scorer(parametrizations.weight_norm), start="random")
    # A method that does not reach what the layer computes its weight from is of no use.
    with pytest.raises(ValueError, match=r"they left \['hidden.weight_orig'\] alone"):
        Anchor(Scorer(torch.nn.utils.spectral_norm), start="random")


def test_anchor__unknown_start__is_named():
    with pytest.raises(ValueError, match="start must be one of copy, random, but got 'zero'"):
        Anchor(nn.Linear(1, 1), start="zero")


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


def test_anchor__other_parameters_in_the_next_update__are_those_that_move():
    torch.manual_seed(0)
    block = Scorer()
    anchor, parameters = Anchor(block, decay=0.5), list(block.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    _perturb(block)

    anchor.update(parameters[:2])
    anchor.update(parameters[2:])
    anchor.update(parameters[2:])
    anchor.update()

    shares = [0.75] * 2 + [0.875] * (len(parameters) - 2)
    mirrored = anchor.block.parameters()
    for begin, moved, target, share in zip(start, mirrored, parameters, shares, strict=True):
        assert torch.allclose(moved, begin.lerp(target, share))


def test_anchor__buffer_replaced_by_the_model__is_still_copied():
    block = Scorer()
    anchor = Anchor(block)
    anchor.update()

    block.norm.running_mean = torch.full((5,), 3.0)
    anchor.update()

    assert torch.equal(anchor.block.norm.running_mean, torch.full((5,), 3.0))


def test_anchor__unknown_precision__is_named():
    with pytest.raises(ValueError, match=r"one of float32, bf16, but got 'fp8'"):
        Anchor(nn.Linear(2, 1), precision="fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchor__bf16__runs_in_bfloat16_and_keeps_its_tensors(dtype):
    torch.manual_seed(0)
    block = Scorer().to(dtype)
    anchor, exact = (Anchor(block, precision=name) for name in ("bf16", "float32"))
    features = torch.randn(9, 6, dtype=dtype)

    scores = anchor(features)

    assert scores.dtype == torch.bfloat16
    assert torch.allclose(scores.float(), exact(features), rtol=0.03, atol=0.03)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(anchor.state_dict()[name], tensor)
        assert anchor.state_dict()[name].dtype == tensor.dtype


def test_anchor__bf16_beside_coordinates__leaves_them_exact():
    class Near(nn.Linear):
        def forward(self, features, coords):
            near = torch.cdist(coords, coords) < 300
            return super().forward(features) + near.sum(dim=-1, keepdim=True)

    block = Near(8, 1)
    ticks = 60_000 + 224 * torch.arange(10.0)
    features, coords = torch.randn(100, 8), torch.cartesian_prod(ticks, ticks)

    scores = Anchor(block, precision="bf16")(features, coords)

    assert torch.allclose(scores.float(), block(features, coords), atol=0.1)


def test_anchor__bf16_of_a_float64_block__is_refused():
    with pytest.raises(ValueError, match=r"must have an attention block of float32 or less"):
        Anchor(nn.Linear(2, 1).double(), precision="bf16")


def test_anchor__float32_under_autocast__runs_in_float32():
    torch.manual_seed(0)
    anchor, features = Anchor(Scorer()), torch.randn(9, 6)
    expected = anchor(features)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = anchor(features)

    assert torch.equal(scores, expected)


def test_anchor__mirror_moved_with_its_block__runs_where_it_is_now():
    block = nn.Linear(4, 1)
    anchor = Anchor(block)
    block.double()
    anchor.block.double()
    features = torch.randn(3, 4, dtype=torch.float64)

    assert torch.equal(anchor(features), block(features))


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
