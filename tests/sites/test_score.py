from typing import NamedTuple

import pytest
import torch
from torch import nn

from mil_anchor import AttentionSite, GatedSite
from mil_anchor.sites.base import ModuleCall, find_submodule, find_submodules, versions_of
from tests.sites.watching import bag, read


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layers.2", "ModuleList has no '2'. It has: 0, 1."),
        ("layers.-3", "has no '-3'"),
        ("pool", "Holder has no 'pool'. It has: layers."),
        ("layers.0.x", "Linear has no 'x'. It has: none."),
        ("layers.*.x", "Linear has no 'x'"),
        ("layers.*", r"must name one submodule .* but it fits \['layers.0', 'layers.1'\]"),
    ],
)
def test_find_submodule__wrong_path__names_the_part_that_fails(path, message):
    with pytest.raises(ValueError, match=message):
        find_submodule(Holder(), path)


def test_find_submodules__pattern__fits_children_in_their_order():
    model = Holder()
    model.attention_0, model.attention_1 = nn.Linear(1, 1), nn.Linear(1, 1)
    model.attention_gate = nn.Linear(1, 1)

    assert [name for name, _ in find_submodules(model, "layers.*")] == ["layers.0", "layers.1"]
    found = find_submodules(model, "attention_[0-9]*")
    assert [name for name, _ in found] == ["attention_0", "attention_1"]


def test_find_submodule__compiled_model__sees_the_model_inside():
    model = Holder()
    root = nn.ModuleDict({"net": torch.compile(model, backend="eager")})

    assert find_submodule(root, "net.layers.-1") is model.layers[1]
    assert find_submodule(root, "net._orig_mod.layers.0") is model.layers[0]
    assert find_submodule(root, "net.layers.-2") is model.layers[0]


def test_module_call__inputs__are_detached_whatever_holds_them():
    class Pair(NamedTuple):
        left: torch.Tensor
        right: int

    x = torch.ones(2, requires_grad=True) * 2
    call = ModuleCall("a", nn.Identity(), ([x], Pair(x, 1)), {"k": {"x": x}}, None)

    (args, pair), kwargs = call.inputs()

    assert isinstance(pair, Pair)
    assert pair.right == 1
    assert not any(t.requires_grad for t in (*args, pair.left, kwargs["k"]["x"]))
    assert x.requires_grad


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_module_call__changed_in_place__is_refused(what):
    x, y = torch.ones(2), torch.ones(2)
    call = ModuleCall("a", nn.Identity(), (x,), {}, y, (versions_of(x), versions_of(y)))
    assert call.inputs()[0][0].equal(x)
    assert call.output is y

    (x if what == "inputs" else y).add_(1)

    with pytest.raises(RuntimeError, match=f"The {what} of the attention block's Identity must"):
        call.inputs() if what == "inputs" else call.output


class Scorer(nn.Module):
    """Returns what it is told to, whatever it takes."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_, **__):
        return self.output


def _read(output, features=None, *, n_bags=None, **site):
    module = Scorer(output)
    site = AttentionSite("a", **site)
    call = ModuleCall("0", module, () if features is None else (features,), {}, output)
    (attention,) = site.settled([call]).read([call], n_bags)
    return attention


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        ("b n r", (2, 7, 3), (2, 3, 7)),
        ("b r n", (2, 3, 7), (2, 3, 7)),
        ("b n", (2, 7), (2, 1, 7)),
        ("n r", (7, 3), (1, 3, 7)),
        ("r n", (3, 7), (1, 3, 7)),
        ("n", (7,), (1, 1, 7)),
        ("b 1 n", (2, 1, 7), (2, 1, 7)),
        ("(b n) r", (14, 3), (2, 3, 7)),
        ("n b r", (7, 2, 3), (2, 3, 7)),
    ],
)
def test_site__layout__turns_the_output_into_bag_row_instance(layout, shape, expected):
    output = torch.randn(shape)
    scores = _read(output, layout=layout, n_bags=2).scores

    assert scores.shape == expected
    if layout == "n b r":
        assert torch.equal(scores, output.permute(1, 2, 0))
    elif "n r" in layout or layout == "(b n) r":
        assert torch.equal(scores[-1, -1], output.reshape(-1, 7, shape[-1])[-1, :, -1])
    else:
        assert torch.equal(scores[-1, -1], output.reshape(-1, 7)[-1])


@pytest.mark.parametrize(
    ("features", "shape", "expected"),
    [
        ((2, 7, 5), (2, 7, 3), (2, 3, 7)),
        ((2, 7, 5), (2, 3, 7), (2, 3, 7)),
        ((2, 7, 5), (2, 7), (2, 1, 7)),
        ((7, 5), (7, 3), (1, 3, 7)),
        ((7, 5), (3, 7), (1, 3, 7)),
        ((7, 5), (7,), (1, 1, 7)),
        ((2, 1, 5), (2, 1, 1), (2, 1, 1)),
        ((1, 5), (1, 1), (1, 1, 1)),
    ],
)
def test_site__without_layout__tells_it_from_the_input(features, shape, expected):
    scores = _read(torch.randn(shape), torch.randn(features)).scores

    assert scores.shape == expected


@pytest.mark.parametrize(
    ("features", "shape"),
    [((2, 3, 5), (2, 3, 3)), ((3, 5), (3, 3)), ((2, 7, 5), (2, 6, 1)), (None, (2, 7))],
)
def test_site__ambiguous_or_unfitting_shape__asks_for_a_layout(features, shape):
    features = None if features is None else torch.randn(features)

    with pytest.raises(ValueError, match=r"block 'a' can.*such as layout='b n r'"):
        _read(torch.randn(shape), features)


def test_site__layout_that_does_not_fit__shows_the_shape():
    with pytest.raises(
        ValueError, match=r"layout 'b n r', but its tap returned a float32 .*\(2, 7\)"
    ):
        _read(torch.randn(2, 7), layout="b n r")


def test_site__fused_bags_of_unknown_number__says_what_is_missing():
    with pytest.raises(ValueError, match="needs the number of bags"):
        _read(torch.randn(14, 2), layout="(b n) r")


def test_site__settled__is_told_by_an_unambiguous_call_only():
    def settled(output, features):
        call = ModuleCall("0", Scorer(output), (features,), {}, output)
        return AttentionSite("a").settled([call])

    assert settled(torch.randn(2, 7, 3), torch.randn(2, 7, 5)).layout == "b n r"
    assert settled(torch.randn(2, 3, 3), torch.randn(2, 3, 5)).layout is None
    assert settled((1, 2), torch.randn(2, 3, 5)).layout is None


def test_site__output_that_is_no_tensor__describes_it():
    with pytest.raises(
        ValueError, match=r"returned a tuple of .a float32 tensor of shape .3,., a str"
    ):
        _read((torch.zeros(3), "x"))


@pytest.mark.parametrize("layout", ["b r", "b n n", "b n x", "b n ..."])
@pytest.mark.parametrize("make", [AttentionSite, lambda a, **x: GatedSite(a, a, a, **x)])
def test_site__impossible_layout__is_refused(layout, make):
    with pytest.raises(ValueError, match="must consist of b"):
        make("a", layout=layout)


class Heads(nn.Module):
    """Two scorers of a list, a temperature, and a mask that reaches them the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(2)])
        self.temperature = 4

    def forward(self, features, padding=None):
        pooled = 0
        for head in self.heads:
            scores = head(features, pad=padding) / self.temperature
            if padding is not None:
                scores = scores.masked_fill(padding[..., None], -torch.inf)
            pooled = pooled + (scores.softmax(dim=1) * features).sum(dim=1)
        return pooled


class Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 1)

    def forward(self, features, pad=None):
        return super().forward(features)


def test_site__pattern_of_blocks__gives_their_scores_as_rows_and_mirrors_all():
    model, features = Heads(), bag(2)
    site = AttentionSite("heads.*", layout="b n r", scale="1/temperature")

    (attention,), difference = read(model, site, {"features": features})

    expected = [head(features).squeeze(-1) / 4 for head in model.heads]
    assert torch.allclose(attention.scores, torch.stack(expected, dim=1))
    assert difference is None
    block = site.find_block(model)
    assert len(list(block.parameters())) == 4
    again = site.bound(model).rescore(block, attention.inputs)
    assert torch.equal(again, attention.scores)


def test_site__pattern_of_blocks_on_other_instances__gives_distributions_of_their_own():
    class Modalities(Heads):
        def forward(self, features):
            (first, second), halves = self.heads, (features[:, :3], features[:, 3:])
            return sum(
                (head(x).softmax(1) * x).sum(1)
                for head, x in zip((first, second), halves, strict=True)
            )

    model = Modalities()
    attention, _ = read(model, "heads.*", {"features": bag(2)})

    assert [a.scores.shape for a in attention] == [(2, 1, 3), (2, 1, 4)]
    block = AttentionSite("heads.*").find_block(model)
    for one in attention:
        again = AttentionSite("heads.*").rescore(block, one.inputs)
        assert torch.equal(again, one.scores)


def test_site__mask_of_the_block__is_read_in_either_polarity():
    model, features = Heads(), bag(2)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    batch = {"features": features}

    for name, expected in (("~pad", ~padding), ("pad", padding)):
        site = AttentionSite("heads.0", layout="b n r", scale=0.25, mask=name)
        (attention,), _ = read(model, site, batch, features, padding)
        assert torch.equal(attention.mask, expected)
    assert read(model, site, batch, features)[0][0].mask is None


def test_site__mask_that_is_no_argument_or_has_another_size__is_refused():
    model, features = Heads(), bag(2)

    with pytest.raises(ValueError, match=r"mask='m' must name an argument .*\['features', 'pad'\]"):
        read(model, AttentionSite("heads.0", mask="m"), {"features": features})
    site = AttentionSite("heads.0", mask="~pad")
    call = ModuleCall("0", model.heads[0], (features, torch.ones(3)), {}, torch.zeros(2, 7, 1))
    with pytest.raises(ValueError, match=r"'pad' .* one entry for each of \(2, 7\)"):
        site.read([call], 2)


def test_site__scale_of_an_attribute_that_is_no_number__is_refused():
    model = Heads()
    for value in (None, nn.Parameter(torch.ones(()))):
        model.temperature = value
        with pytest.raises(ValueError, match="must name a fixed number of the model"):
            AttentionSite("heads.0", scale="1/temperature").bound(model)
        del model.temperature


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), "2", "1/2", "a b", ""])
def test_site__scale_that_cannot_be_one__is_refused(scale):
    with pytest.raises(ValueError, match="scale must be a number above 0, or the name"):
        AttentionSite("a", scale=scale)


@pytest.mark.parametrize(
    ("output", "returned"), [(0, torch.zeros(2, 7)), (5, (1, 2)), ("a", (1, 2)), ("a", {"b": 1})]
)
def test_site__output_that_is_not_there__is_refused(output, returned):
    call = ModuleCall("0", Scorer(returned), (torch.zeros(2, 7, 3),), {}, returned)
    site = AttentionSite("a", output=output)
    with pytest.raises(ValueError, match=f"output={output!r} must pick the scores from what"):
        site.read([call], None)


def test_site__path_of_a_multihead_attention__names_the_right_kind():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))

    with pytest.raises(ValueError, match=r"Write MultiheadSite\('0'\)"):
        AttentionSite("0").watched(model)


def test_gated_site__unknown_activation__is_refused():
    with pytest.raises(ValueError, match="must be one of tanh, sigmoid, relu, gelu or None, but"):
        GatedSite("a", "b", "c", value_activation="sin")


def test_site__within__moves_every_path():
    site = AttentionSite("heads.0", tap="x", scale="1/temperature").within("net")

    assert (site.block, site.tap, site.scale) == ("net.heads.0", "x", "1/net.temperature")
    assert AttentionSite("a", scale=2.0).within("").block == "a"
    assert GatedSite("a", "b", "c").within("net") == GatedSite("net.a", "net.b", "net.c")
    assert GatedSite("a", None, "c").within("net") == GatedSite("net.a", None, "net.c")


def test_site__tap_that_does_not_run__is_named():
    class Bypassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(5, 1)

        def forward(self, features):
            return features @ self.score.weight.T

    model = nn.Sequential(Bypassing())
    with pytest.raises(ValueError, match="The tap 'score' must run whenever"):
        read(model, AttentionSite("0", tap="score"), {"features": bag()})


def test_site__tap_that_runs_twice_in_its_block__is_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(5, 1)

        def forward(self, features):
            return self.score(features) + self.score(-features)

    with pytest.raises(ValueError, match=r"'score' must run once in each call of .* '0'"):
        read(nn.Sequential(Twice()), AttentionSite("0", tap="score"), {"features": bag()})


def test_site__rescored__runs_its_block_no_further_than_the_tap():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(5, 1)

        def forward(self, features):
            scores = self.score(features)
            return ((scores + torch.randn_like(scores) * 0).softmax(1) * features).sum(1)

    model, site = nn.Sequential(Pool()), AttentionSite("0", tap="score")
    (attention,), _ = read(model, site, {"features": bag()})
    state = torch.get_rng_state()

    again = site.rescore(model[0], attention.inputs)

    assert torch.equal(again, attention.scores)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0].score._forward_hooks


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.u = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid())
        self.w = nn.Linear(4, 2)

    def forward(self, features):
        scores = self.w(self.v(features) * self.u(features))
        return torch.einsum("bnr,bnd->brd", scores.softmax(dim=1), features)


def test_gated_site__three_siblings__are_read_mirrored_and_run_again():
    model, features = Gated(), bag(2)
    site = GatedSite("v", "u", "w")

    (attention,), difference = read(model, site, {"features": features})

    expected = model.w(model.v(features) * model.u(features)).mT
    assert torch.equal(attention.scores, expected)
    assert difference is None
    block = site.find_block(model)
    assert {id(p) for p in block.parameters()} == {id(p) for p in model.parameters()}
    assert torch.equal(site.rescore(block, attention.inputs), expected)


def test_gated_site__parts_that_run_unequally_often__are_refused():
    class Twice(Gated):
        def forward(self, features):
            return super().forward(features) + self.w(torch.zeros(1, 4)).sum()

    with pytest.raises(ValueError, match="must run equally often, but they ran 1 and 2 times"):
        read(Twice(), GatedSite("v", "u", "w"), {"features": bag()})
