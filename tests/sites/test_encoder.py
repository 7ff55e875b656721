import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mil_anchor import AttentionSite, ClassTokenSite, find_site
from mil_anchor.anchor import Anchor
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.sites.encoder import EncoderSite, with_encoder
from tests.baselines.test_with_plugin import MODELS
from tests.callbacks.tiny import TinyMIL
from tests.sites.test_products import Squared
from tests.sites.watching import bag

SITE = EncoderSite(AttentionSite("net.attention", layout="b n r"), "net")


class Holder(nn.Module):
    """Holds a model as a LightningModule does, and calls it."""

    def __init__(self, net, how=lambda net, features: net(features)) -> None:
        super().__init__()
        self.net = net
        self.how = how

    def forward(self, features):
        return self.how(self.net, features)


def _read(root, site, features, batch=None, *, only_with_grad=True):
    recorder = AttentionRecorder(root, site, only_with_grad=only_with_grad)
    recorder.start()
    root(features)
    read = recorder.take(batch or {"features": features})
    recorder.remove()
    return recorder, read


def _moved(block, seed=1):
    """An anchor of other weights than the block has."""
    anchor = Anchor(block)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in anchor.block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return anchor


def _padded(n_bags, n_instances, width=6):
    features = bag(n_bags, n_instances, width)
    lengths = n_instances - 2 * (torch.arange(n_bags) % 2)
    mask = torch.arange(n_instances) < lengths[:, None]
    return {"features": features.masked_fill(~mask[..., None], 9.0), "mask": mask}


@pytest.mark.parametrize("n_bags", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_encoder_site__every_baseline__gives_the_scores_of_a_copy_of_the_model(name, n_bags):
    torch.manual_seed(0)
    model, batch = MODELS[name](), _padded(n_bags, 7)
    site = EncoderSite(find_site(model).within("net"), "net")
    root = Holder(model, lambda net, x: net(x, batch["mask"]))
    recorder, read = _read(root, site, batch["features"], batch)
    anchor = _moved(recorder.block)

    scores = [anchor.apply(recorder.site.rescore, one.inputs) for one in read]

    expected = anchor.block(batch["features"], batch["mask"]).scores
    for own, bag_scores in zip(
        (row for one in scores for row in one), expected, strict=True
    ):  # bag by bag, some without their padding
        real = bag_scores > -torch.inf
        mine = own[real[: len(own)]] if own.shape == bag_scores.shape else own.flatten()
        assert torch.allclose(mine, bag_scores[real], atol=1e-6)
    assert not any(one.requires_grad for one in scores)
    assert recorder.block is model


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 3), st.integers(0, 99))
def test_encoder_site__padding_and_order__change_no_score(n_bags, n_instances, n_padding, seed):
    torch.manual_seed(seed)
    root, features = Holder(TinyMIL(0.0)), bag(n_bags, n_instances, 4, seed)
    padded = torch.cat([features, 9 * torch.ones(n_bags, n_padding, 4)], dim=1)
    order = torch.randperm(n_instances)

    scores = []
    for given_features in (features, padded, features[:, order]):
        recorder, (read,) = _read(root, SITE, given_features)
        scores.append(_moved(recorder.block).apply(recorder.site.rescore, read.inputs))

    assert torch.allclose(scores[0], scores[1][..., :n_instances], atol=1e-5)
    assert torch.allclose(scores[0][..., order], scores[2], atol=1e-5)


def test_encoder_site__dropout__is_off_in_the_copy_and_draws_nothing():
    torch.manual_seed(0)
    root, features = Holder(TinyMIL(0.5)), bag(2, 6, 4)
    recorder, (read,) = _read(root, SITE, features)
    state = torch.get_rng_state()

    scores = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)

    quiet = copy.deepcopy(root.net).eval()
    assert torch.equal(scores, quiet.attention(quiet.encoder(features)).mT)
    assert not torch.allclose(scores, read.scores)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "how",
    [
        lambda net, x: net(features=x),
        lambda net, x: torch.stack([net(one[None]) for one in x]),
        lambda net, x: net(x) + net(x.flip(0)),
        lambda net, x: (net.eval()(x), net.train()(x)),
    ],
    ids=["keyword", "bag by bag", "twice", "both modes"],
)
def test_encoder_site__calls_of_any_form__are_all_scored_again(how):
    torch.manual_seed(0)
    root, features = Holder(TinyMIL(0.0), how), bag(3, 6, 4)
    recorder, read = _read(root, SITE, features)

    assert len(read) > 0
    for one in read:
        again = Anchor(recorder.block).apply(recorder.site.rescore, one.inputs)
        assert torch.allclose(again, one.scores, atol=1e-6)


def test_encoder_site__model_that_takes_the_batch__gets_it_again():
    class OfBatch(TinyMIL):
        def forward(self, batch):
            return super().forward(batch["features"])

    root = Holder(OfBatch(0.0), lambda net, x: net({"label": [1, 0], "features": x}))
    recorder, (read,) = _read(root, SITE, bag(2, 6, 4))

    again = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)

    assert torch.allclose(again, read.scores, atol=1e-6)


def test_encoder_site__model_that_runs_bag_by_bag__runs_once_for_all_of_them():
    torch.manual_seed(0)
    model = MODELS["transmil"]()
    runs = []

    class Counting(type(model)):
        def forward(self, *args, **kwargs):
            runs.append(1)
            return super().forward(*args, **kwargs)

    model.__class__ = Counting
    recorder, read = _read(model, EncoderSite(find_site(model), ""), bag(3, 7, 6))
    one, other = _moved(recorder.block, 1), _moved(recorder.block, 2)
    runs.clear()

    first = [one.apply(recorder.site.rescore, item.inputs) for item in read]
    assert len(runs) == 1

    # Nothing is left over for the same copy once it has moved, nor for another one.
    with torch.no_grad():
        for parameter, moved in zip(one.block.parameters(), other.block.parameters(), strict=True):
            parameter.copy_(moved)
    second = [one.apply(recorder.site.rescore, item.inputs) for item in read]
    assert len(runs) == 2
    assert not any(map(torch.equal, first, second))
    _moved(recorder.block, 3).apply(recorder.site.rescore, read[0].inputs)
    assert torch.equal(other.apply(recorder.site.rescore, read[1].inputs), second[1])


def test_encoder_site__what_follows_the_scores__does_not_run():
    class Failing(TinyMIL):
        def forward(self, features):
            self.attention(self.encoder(features))
            if not self.training:
                raise KeyError("behind the scores")

    recorder, (read,) = _read(Holder(Failing(0.0)), SITE, bag(2, 6, 4))

    again = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)

    assert torch.allclose(again, read.scores, atol=1e-6)


def test_encoder_site__scores_masked_in_place__are_those_before_it():
    class Masking(TinyMIL):
        def forward(self, features):
            scores = self.attention(self.encoder(features))
            scores[:, :2] = -1e9
            self.head(scores.softmax(dim=1).flatten(1)[:, :8])
            return self.attention(self.encoder(features))

    recorder, read = _read(Holder(Masking(0.0)), SITE, bag(2, 6, 4))

    for one in read:
        again = Anchor(recorder.block).apply(recorder.site.rescore, one.inputs)
        assert torch.allclose(again, one.scores, atol=1e-6)
        assert bool((again > -1e8).all())


def test_encoder_site__attention_under_no_grad_first__is_left_out_in_the_copy_too():
    class Looking(TinyMIL):
        def forward(self, features):
            with torch.no_grad():
                self.attention(self.encoder(features.flip(1)))
            return super().forward(features)

    recorder, (read,) = _read(Holder(Looking(0.0)), SITE, bag(2, 6, 4))

    again = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)

    assert torch.allclose(again, read.scores, atol=1e-6)
    assert not again.requires_grad


def test_encoder_site__recorded_in_evaluation__is_scored_again_too():
    root, features = Holder(TinyMIL(0.5)).eval(), bag(2, 6, 4)
    with torch.inference_mode():
        recorder, (read,) = _read(root, SITE, features, only_with_grad=False)
        again = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)

    assert torch.allclose(again, read.scores, atol=1e-6)


def test_encoder_site__site_that_counts_the_models_input__is_read_inside_it():
    torch.manual_seed(0)
    root, features = Holder(Squared()), bag(2, 7)
    for inner in (
        ClassTokenSite("attention.qkv").within("net"),
        ClassTokenSite("net.attention.qkv"),
    ):
        recorder, (read,) = _read(root, EncoderSite(inner, "net"), features)
        again = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)

        assert torch.allclose(again, read.scores, atol=1e-6)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("in place", marks=pytest.mark.slow),
        "wrapper",
        pytest.param("part", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_encoder_site__compiled_model__runs_its_copy_eagerly(mode):
    torch.manual_seed(0)
    net, features = TinyMIL(0.0), bag(2, 6, 4)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    if mode == "in place":
        net.compile(backend=backend)
    elif mode == "part":
        net.attention = torch.compile(net.attention, backend=backend)
    else:
        net = torch.compile(net, backend=backend)
    root = Holder(net)
    site = with_encoder(AttentionSite("net.attention", layout="b n r"), root)
    recorder, (read,) = _read(root, site, features)
    n_graphs = len(compiled)

    again = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)
    torch.compiler.reset()

    assert isinstance(recorder.block, TinyMIL)
    assert torch.allclose(again, read.scores, atol=1e-6)
    # Its hooks are new in every step: it would be compiled each time.
    assert len(compiled) == n_graphs > 0


@pytest.mark.parametrize(
    "how",
    [
        lambda net, x: net.forward(x),
        lambda net, x: net.attention(net.encoder(x)),
        lambda net, x: (net(x), net.attention(net.encoder(x))),
    ],
    ids=["forward", "parts", "parts afterwards"],
)
def test_encoder_site__model_not_called_as_a_module__says_what_to_do(how):
    with pytest.raises(ValueError, match="must run in a call of 'net' as a module, but it ran wi"):
        _read(Holder(TinyMIL(0.0), how), SITE, bag(2, 6, 4))


def test_encoder_site__fewer_instances_in_training__are_an_error():
    class Dropping(TinyMIL):
        def forward(self, features):
            return super().forward(features[:, 2:] if self.training else features)

    recorder, (read,) = _read(Holder(Dropping(0.0)), SITE, bag(2, 6, 4))

    with pytest.raises(ValueError, match=r"shapes \[\(2, 2, 6\)\] there and \[\(2, 2, 4\)\] here"):
        Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)


def test_encoder_site__text_and_paths__are_those_of_the_inner_site():
    inner = AttentionSite("attention", scale="1/temperature")
    site = EncoderSite(inner, "").within("a.net")

    assert site.path == "a.net.attention"
    assert site.model == "a.net"
    assert (site.n_class_tokens, site.must_be_proven, site.layout) == (0, True, None)
    expected = "AttentionSite('a.net.attention', scale='1/a.net.temperature')"
    assert str(site) == f"EncoderSite({expected}, 'a.net')"
    assert eval(str(site)) == site
    unproven = EncoderSite(ClassTokenSite("net.qkv"), "net")
    assert (unproven.n_class_tokens, unproven.must_be_proven, unproven.layout) == (1, False, "")
    assert (unproven.scale, SITE.scale) == (1, 1.0)


def test_encoder_site__scale_by_name_and_open_layout__are_filled_in():
    root = Holder(TinyMIL(0.0))
    root.net.temperature = 4.0
    site = EncoderSite(AttentionSite("net.attention", scale="1/net.temperature"), "net")

    recorder, (read,) = _read(root, site, bag(2, 6, 4))

    assert site.exists_in(root)
    assert not EncoderSite(site.inner, "model").exists_in(root)
    assert (recorder.site.scale, recorder.site.layout) == (0.25, "b n r")
    again = Anchor(recorder.block).apply(recorder.site.rescore, read.inputs)
    assert torch.allclose(again, read.scores, atol=1e-6)


def test_with_encoder__any_nesting__takes_the_outermost_model_that_runs():
    net = TinyMIL()
    nested = Holder(nn.ModuleDict({"mil": nn.Sequential(net)}))
    aliased = Holder(net)
    aliased.attention = net.attention

    assert with_encoder(AttentionSite("net.mil.0.attention"), nested).model == "net.mil"
    assert with_encoder(AttentionSite("net.attention"), aliased).model == "net"
    assert with_encoder(AttentionSite("attention"), aliased).model == "net"
    assert with_encoder(SITE, nested) is SITE


@pytest.mark.parametrize("block", ["attention", "[ah]*"])
def test_with_encoder__no_model_around_the_block__says_how_to_make_one(block):
    with pytest.raises(
        ValueError, match=r"in a submodule of TinyMIL that holds the encoder, too.*Wrap encoder"
    ):
        with_encoder(AttentionSite(block), TinyMIL())
