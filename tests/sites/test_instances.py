import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from baselines.transmil import TransMIL
from mil_anchor import (
    AttentionSite,
    ClassTokenSite,
    CriticalInstanceSite,
    GatedSite,
    MultiheadSite,
    find_site,
)
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.sites.base import RecordedAttention, Site
from mil_anchor.sites.encoder import EncoderSite
from tests.sites.test_products import Squared
from tests.sites.watching import bag


class Scored(nn.Module):
    """Feeds its block through `to_block` and pools by the softmax over `axis`."""

    def __init__(self, block, to_block=lambda x: x) -> None:
        super().__init__()
        self.block = block
        self.to_block = to_block

    def forward(self, features):
        return self.block(self.to_block(features))


class Heads(nn.Module):
    """Two scorers, on the same features or each on its own."""

    def __init__(self, *, shared) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)])
        self.shared = shared

    def forward(self, features):
        return [h(features if self.shared else features + i) for i, h in enumerate(self.heads)]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.u, self.w = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, features):
        return self.w(self.v(features) * self.u(features))


class Critical(nn.Module):
    def __init__(self, *, gathers) -> None:
        super().__init__()
        self.gathers = gathers
        self.q, self.classifier = nn.Linear(5, 4), nn.Linear(5, 2)

    def forward(self, features):
        best = self.classifier(features).argmax(dim=-2)
        self.q(features)
        if not self.gathers:
            self.q(features[best])


class Attending(nn.Module):
    """A learned seed, or the bag with a class token, attends."""

    def __init__(self, *, batch_first, class_token=False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.seed = nn.Parameter(torch.randn(1, 1, 6))
        self.class_token = class_token

    def forward(self, features):
        axis = 1 if self.attention.batch_first else 0
        seed = self.seed.expand(len(features), -1, -1)
        if axis == 0:
            features, seed = features.transpose(0, 1), seed.transpose(0, 1)
        tokens = torch.cat([seed, features], dim=axis)
        keys = tokens if self.class_token else features
        return self.attention(keys if self.class_token else seed, key=keys, value=keys)


def _instances(model, site, features, batch=None):
    """What the site says that the block weighed, of each distribution of one forward."""
    recorder = AttentionRecorder(model, site, only_with_grad=True)
    recorder.start()
    model(features)
    read = recorder.take(batch or {"features": features})
    recorder.remove()
    return [recorder.site.instances(attention.inputs) for attention in read]


LAYOUTS = {
    "batched": (AttentionSite("block", layout="b n r"), lambda x: x),
    "told": (AttentionSite("block"), lambda x: x),
    "fused": (AttentionSite("block", layout="(b n) r"), lambda x: x.flatten(0, 1)),
    "instances first": (AttentionSite("block", layout="n b r"), lambda x: x.transpose(0, 1)),
    "fused, instances first": (
        AttentionSite("block", layout="(n b) r"),
        lambda x: x.transpose(0, 1).flatten(0, 1),
    ),
}


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    st.sampled_from(list(LAYOUTS)),
    st.integers(1, 4),
    st.integers(4, 9),
    st.integers(1, 3),
)
def test_instances__any_layout__are_the_bags_in_order(name, n_bags, n_instances, n_rows):
    site, to_block = LAYOUTS[name]
    features = bag(n_bags, n_instances)
    batch = {"features": features, "bag_id": [str(i) for i in range(n_bags)]}

    (instances,) = _instances(Scored(nn.Linear(5, n_rows), to_block), site, features, batch)

    assert torch.equal(instances, features)


@pytest.mark.parametrize("layout", ["n r", None])
def test_instances__block_without_a_bag_axis__get_one(layout):
    features = bag(1, 6)
    model = Scored(nn.Linear(5, 2), lambda x: x.squeeze(0))

    (instances,) = _instances(model, AttentionSite("block", layout=layout), features)

    assert torch.equal(instances, features)


def test_instances__attention_site__are_what_the_model_pools():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    features = bag(3, 6)
    recorder = AttentionRecorder(model, AttentionSite("2"), only_with_grad=True)
    recorder.start()
    weights = model(features).softmax(dim=1)
    (attention,) = recorder.take({"features": features})
    recorder.remove()

    instances = recorder.site.instances(attention.inputs)

    assert not instances.requires_grad
    pooled = attention.scores.softmax(dim=-1) @ instances
    assert torch.allclose(pooled[:, 0], (weights * model[:2](features)).sum(dim=1), atol=1e-6)


def test_instances__transmil__are_the_tokens_of_each_bag_without_its_class_token():
    torch.manual_seed(0)
    # A width of the number of instances could be mistaken for them.
    model = TransMIL(5, 2, hidden=8).eval()
    features = bag(2, 8)
    seen = []
    model.layers[-1].attention.query_key.register_forward_hook(
        lambda module, args, output: seen.append(args[0])
    )

    instances = _instances(model, find_site(model), features)

    assert len(instances) == 2
    for own, tokens in zip(instances, seen, strict=True):
        assert torch.equal(own, tokens[:, 1:])


def test_instances__rows_of_several_blocks__are_those_that_all_judge():
    features = bag(2, 6)
    site = AttentionSite("heads.*")

    (instances,) = _instances(Heads(shared=True), site, features)

    assert torch.equal(instances, features)
    with pytest.raises(ValueError, match="must weigh the same features to be rows of one"):
        _instances(Heads(shared=False), site, features)


def test_instances__block_of_another_input__says_which_is_needed():
    class Weighing(nn.Module):
        def forward(self, importance, features):
            return features.sum(dim=-1, keepdim=True) * importance

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Weighing()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, features):
            return self.block(self.scale, features)

    with pytest.raises(ValueError, match="6 in each of 2 bags, but it is a float32 tensor of"):
        _instances(Model(), AttentionSite("block", layout="b n r"), bag(2, 6))


@pytest.mark.parametrize("n_bags", [1, 3])
def test_instances__gated_site__are_what_its_value_got(n_bags):
    features = bag(n_bags, 6)

    (instances,) = _instances(Gated(), GatedSite("v", "u", "w"), features)
    (flat,) = _instances(
        Scored(Gated(), lambda x: x.flatten(0, 1)),
        GatedSite("block.v", "block.u", "block.w", layout="(b n) r"),
        features,
    )

    assert torch.equal(instances, features)
    assert torch.equal(flat, features)


@pytest.mark.parametrize("gathers", [True, False])
def test_instances__critical_instance_site__are_all_instances(gathers):
    features = bag(1, 6)
    site = CriticalInstanceSite("q", classifier="classifier" if gathers else None)

    (instances,) = _instances(Critical(gathers=gathers), site, features.squeeze(0))

    assert torch.equal(instances, features)


@pytest.mark.parametrize("n_instances", [4, 7])
def test_instances__class_token_site__are_its_tokens_without_token_repeats_and_padding(n_instances):
    torch.manual_seed(0)
    model, features = Squared(), bag(2, n_instances)

    (instances,) = _instances(model, ClassTokenSite("attention.qkv"), features)

    assert torch.equal(instances, model.embed(features))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_instances__multihead_site__are_its_keys(batch_first, class_token):
    features = bag(3, 7, width=6)
    model = Attending(batch_first=batch_first, class_token=class_token)

    site = MultiheadSite("attention", class_token=class_token)
    (instances,) = _instances(model, site, features)

    assert torch.equal(instances, features)


def test_instances__multihead_site_with_tap__says_which_block_has_keys():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = Attending(batch_first=True)

        def forward(self, features):
            return self.pool(features)

    with pytest.raises(ValueError, match=r"Name the attention itself.*'pool.attention'"):
        _instances(Model(), MultiheadSite("pool", tap="attention"), bag(2, 6, width=6))


def test_instances__encoder_site__are_the_raw_features():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    features = bag(2, 6)
    site = EncoderSite(AttentionSite("2"), "")

    (instances,) = _instances(model, site, features)
    (single,) = _instances(model, site, features[0])

    assert torch.equal(instances, features)
    assert torch.equal(single, features[:1])


def test_instances__encoder_site_of_a_model_that_runs_bag_by_bag__are_those_of_the_bag():
    torch.manual_seed(0)
    model = TransMIL(5, 2, hidden=8)
    features = bag(2, 6)
    site = EncoderSite(find_site(model), "")
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False

    instances = _instances(model, site, features)

    assert torch.equal(torch.cat(instances), features)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, features):
            return self.net(features, mask)

    with pytest.raises(ValueError, match="Use batch_size=1 if bags are padded"):
        _instances(Masked(), site.within("net"), features, {"features": features, "mask": mask})


def test_instances__site_of_ones_own__says_what_to_override():
    class Own(Site):
        path = "somewhere"

        def within(self, prefix):
            return self

        def find_block(self, root):
            return root

        def watched(self, root):
            return {"": root}

        def read(self, calls, n_bags):
            return [RecordedAttention(call.output.mT, None, call.inputs()) for call in calls]

        def rescore(self, block, inputs):
            return block(*inputs[0]).mT

    with pytest.raises(ValueError, match=r"a Own does not tell them.*or override Site.instances"):
        _instances(nn.Linear(5, 1), Own(), bag(2, 6))
