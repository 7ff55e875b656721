import pytest
from torch import nn

from mil_anchor import AttentionSite, GatedSite, find_site, register_site
from mil_anchor.sites.known import KNOWN_MODELS
from mil_anchor.sites.registry import as_site, known_site


class Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 2)])
        self.kind = "wide"


class Child(Known):
    pass


class Wrapper(nn.Module):
    def __init__(self, *models) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({f"m{index}": model for index, model in enumerate(models)})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("mil_anchor.sites.registry._REGISTRY", {})
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
        ValueError,
        match=r"several known models. Name one: "
        r"AnchorCallback\(AttentionSite\('inner.m0.layers.-1', layout='b n r'\)\) or ",
    ):
        find_site(Wrapper(Known(), Known()))


def test_find_site__unknown_model__lists_likely_blocks():
    model = Wrapper(nn.Sequential(nn.Linear(1, 1)))
    model.attention_pool = nn.Linear(1, 1)

    with pytest.raises(
        ValueError, match=r"AnchorCallback\('attention'\).*Submodules: attention_pool\."
    ):
        find_site(model)
    assert known_site(model)[0] is None


def test_register_site__bare_name__fits_classes_that_have_the_named_blocks():
    register_site("Wrapper", AttentionSite("inner.attention"))
    register_site("Wrapper", GatedSite("inner.v", "inner.u", "inner.w"))
    plain, gated = Wrapper(), Wrapper()
    plain.inner["attention"] = nn.Linear(1, 1)
    for name in "vuw":
        gated.inner[name] = nn.Linear(1, 1)

    assert find_site(plain) == AttentionSite("inner.attention")
    assert find_site(gated) == GatedSite("inner.v", "inner.u", "inner.w")
    assert known_site(Wrapper())[0] is None


def test_register_site__condition__chooses_by_an_attribute():
    register_site(f"{__name__}.Known", AttentionSite("layers.0"), when="kind=narrow")

    model = Known()
    assert find_site(model).block == "layers.-1"
    model.kind = "narrow"
    assert find_site(model).block == "layers.0"


def test_register_site__condition_on_an_attribute_that_is_not_there__does_not_hold():
    register_site(f"{__name__}.Known", AttentionSite("layers.0"), when="gated=True")

    assert find_site(Known()).block == "layers.-1"


def test_register_site__empty_name__is_refused_and_a_path_is_a_site():
    with pytest.raises(ValueError, match="A class must have a name"):
        register_site("", "a")
    register_site(f"{__name__}.Known", "layers.0")
    assert find_site(Known()) == AttentionSite("layers.0")


def test_register_site__registered_again__is_the_one_asked_first():
    register_site(f"{__name__}.Known", AttentionSite("layers.0"))

    assert find_site(Known()).block == "layers.0"


def test_known_models__of_the_promised_libraries__are_in_the_table():
    sources = " ".join(known.source for known in KNOWN_MODELS)

    for library in ("torchmil", "MONAI", "slideflow", "MIL-Lab", "CLAM", "TransMIL", "DSMIL"):
        assert library in sources
    for repository in ("ABMIL (official)", "ACMIL", "AEM"):
        assert repository in sources
    assert len({(k.name, k.when, str(k.site)) for k in KNOWN_MODELS}) == len(KNOWN_MODELS)


def test_known_site__several_of_a_bare_name__tell_nothing():
    register_site("Wrapper", AttentionSite("inner.attention"))
    models = [Wrapper(), Wrapper()]
    for model in models:
        model.inner["attention"] = nn.Linear(1, 1)

    assert known_site(nn.ModuleList(models[:1])) == (AttentionSite("0.inner.attention"), False)
    assert known_site(nn.ModuleList(models)) == (None, False)
    # A class that is registered with its package goes first.
    known = AttentionSite("2.layers.-1", layout="b n r")
    assert known_site(nn.ModuleList([*models, Known()])) == (known, True)


@pytest.mark.parametrize("site", [{"block": "a"}, 3, AttentionSite])
def test_as_site__neither_path_nor_site__is_refused(site):
    with pytest.raises(TypeError, match=r"must be a path, such as .* but got"):
        as_site(site)
    assert as_site("a.b") == AttentionSite("a.b")
