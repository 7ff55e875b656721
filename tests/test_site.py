import pytest
import torch
from torch import nn

from mil_anchor import AttentionSite, find_site, register_site
from mil_anchor.site import find_submodule


class Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 2)])


class Child(Known):
    pass


class Wrapper(nn.Module):
    def __init__(self, *models) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({f"m{index}": model for index, model in enumerate(models)})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("mil_anchor.site._REGISTRY", {})
    register_site(f"{__name__}.Known", AttentionSite("layers.-1", layout="b n r"))


def test_find_site__known_model_or_subclass_at_any_depth__gives_the_path_from_the_root():
    assert find_site(Known()).block == "layers.-1"
    for model in (Known(), Child()):
        root = Wrapper(Wrapper(model))
        site = find_site(root)
        assert site.block == "inner.m0.inner.m0.layers.-1"
        assert site.find_block(root) is model.layers[1]


def test_find_site__several_known_models__asks_which():
    with pytest.raises(
        ValueError, match=r"several known models, with blocks \['inner.m0.layers.-1'"
    ):
        find_site(Wrapper(Known(), Known()))


def test_find_site__unknown_model__lists_likely_blocks():
    model = Wrapper(nn.Sequential(nn.Linear(1, 1)))
    model.attention_pool = nn.Linear(1, 1)

    with pytest.raises(
        ValueError, match=r"AnchorCallback\('attention'\).*Submodules: attention_pool\."
    ):
        find_site(model)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layers.2", "ModuleList has no '2'. It has: 0, 1."),
        ("layers.-3", "has no '-3'"),
        ("pool", "Known has no 'pool'. It has: layers."),
        ("layers.0.x", "Linear has no 'x'. It has: none."),
    ],
)
def test_find_submodule__wrong_path__names_the_part_that_fails(path, message):
    with pytest.raises(ValueError, match=message):
        find_submodule(Known(), path)


def test_register_site__name_without_module__is_refused():
    with pytest.raises(ValueError, match=r"'package\.module\.Class', but got 'Known'"):
        register_site("Known", AttentionSite("a"))


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
    ],
)
def test_site__layout__turns_the_output_into_bag_row_instance(layout, shape, expected):
    output = torch.randn(shape)
    scores = AttentionSite("a", layout=layout).read(output, n_bags=2)

    assert scores.shape == expected
    if "n r" in layout or layout == "(b n) r":
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
    scores = AttentionSite("a").read(torch.randn(shape), features=torch.randn(features))

    assert scores.shape == expected


@pytest.mark.parametrize(
    ("features", "shape"),
    [((2, 3, 5), (2, 3, 3)), ((3, 5), (3, 3)), ((2, 7, 5), (2, 6, 1)), (None, (2, 7))],
)
def test_site__ambiguous_or_unfitting_shape__asks_for_a_layout(features, shape):
    features = None if features is None else torch.randn(features)

    with pytest.raises(ValueError, match=r"AttentionSite\('a', layout="):
        AttentionSite("a").read(torch.randn(shape), features=features)


def test_site__layout_that_does_not_fit__shows_the_shape():
    with pytest.raises(
        ValueError, match=r"layout 'b n r', but its tap returned a float32 .*\(2, 7\)"
    ):
        AttentionSite("a", layout="b n r").read(torch.randn(2, 7))


def test_site__fused_bags_of_unknown_number__says_what_is_missing():
    with pytest.raises(ValueError, match="needs the number of bags"):
        AttentionSite("a", layout="(b n) r").read(torch.randn(14, 2))


def test_site__with_layout__is_told_by_an_unambiguous_call_only():
    site = AttentionSite("a")

    assert site.with_layout(torch.randn(2, 7, 3), torch.randn(2, 7, 5)).layout == "b n r"
    assert site.with_layout(torch.randn(2, 3, 3), torch.randn(2, 3, 5)) is site
    assert site.with_layout((1, 2), torch.randn(2, 3, 5)) is site


def test_site__output_that_is_no_tensor__describes_it():
    with pytest.raises(
        ValueError, match=r"returned a tuple of .a float32 tensor of shape .3,., a str"
    ):
        AttentionSite("a").read((torch.zeros(3), "x"))


@pytest.mark.parametrize("layout", ["b r", "b n n", "b n x", "b n ..."])
def test_site__impossible_layout__is_refused(layout):
    with pytest.raises(ValueError, match="must consist of b"):
        AttentionSite("a", layout=layout)
