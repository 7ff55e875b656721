import pytest
import torch
from torch import nn

from mil_anchor import AttentionSite, GatedSite
from mil_anchor.sites.discovery import NothingToSeeError
from mil_anchor.sites.gated import activated
from tests.sites.watching import bag, find


class Plain(nn.Module):
    """An encoder, a scorer whose last layer is the tap, and a head over two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
        self.inner = nn.Module()
        self.inner.scorer = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
        self.head = nn.Linear(6, 2)
        self.scale = 1.0

    def forward(self, features):
        hidden = self.encoder(features)
        attention = (self.inner.scorer(hidden) * self.scale).softmax(dim=1)
        return self.head((attention * hidden).sum(dim=1))


@pytest.mark.parametrize("n_bags", [1, 2, 3])
@pytest.mark.parametrize("n_instances", [2, 3, 7])
def test_discovery__scorer_behind_an_encoder__is_mirrored_whole(n_bags, n_instances):
    # As many bags as classes, as many instances as classes: the loss's softmax is none of ours.
    label = torch.zeros(n_bags, dtype=torch.long)
    site = find(
        Plain(),
        bag(n_bags, n_instances),
        loss=lambda logits: nn.functional.cross_entropy(logits.softmax(1).log(), label),
        n_bags=n_bags,
    )

    assert site == AttentionSite("inner.scorer", layout="b n r")


def test_discovery__temperature__becomes_the_scale():
    model = Plain()
    model.scale = 0.25

    assert find(model, bag()) == AttentionSite("inner.scorer", layout="b n r", scale=0.25)


def test_discovery__softmax_of_the_negative_scores__is_not_that_of_the_scores():
    model = Plain()
    model.scale = -1.0

    with pytest.raises(NothingToSeeError):
        find(model, bag())


def test_discovery__one_attention_found_and_another_unclear__is_left_to_the_user():
    class Both(Loose):
        def forward(self, features):
            hidden = self.encoder(features)
            attention = self.inner.scorer(hidden).softmax(dim=1)
            return super().forward(features) + self.head((attention * hidden).sum(dim=1))

    with pytest.raises(ValueError, match=r"from \['inner.scorer.2', 'last'\]. Name one: Anchor"):
        find(Both(lambda m, h: torch.sin(m.first(h))), bag())


def test_discovery__frozen_encoder_or_first_layer__changes_nothing():
    model = Plain()
    model.encoder.requires_grad_(False)
    assert find(model, bag()).block == "inner.scorer"


class Parallel(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(6, 1)

    def forward(self, features):
        hidden = self.encoder(features)
        attention = self.second(hidden).softmax(dim=1)
        return super().forward(features) + self.head((attention * hidden).sum(dim=1))


def test_discovery__two_attentions__lists_both_ready_to_paste():
    with pytest.raises(ValueError, match="One attention block must be meant") as error:
        find(Parallel(), bag())

    for line in ("'inner.scorer', layout='b n r'", "'second', layout='b n r'"):
        assert f"AnchorCallback(AttentionSite({line}))" in str(error.value)


class Loose(Plain):
    """The scorer's layers are siblings, joined by functions: nothing owns them."""

    def __init__(self, join) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 1)
        self.join = join

    def forward(self, features):
        hidden = self.encoder(features)
        attention = self.last(self.join(self, hidden)).softmax(dim=1)
        return self.head((attention * hidden).sum(dim=1))


@pytest.mark.parametrize("first", [None, "tanh", "relu", "gelu"])
@pytest.mark.parametrize("second", [None, "sigmoid"])
def test_discovery__siblings_with_functional_activations__are_a_gated_site(first, second):
    site = find(
        Loose(lambda m, h: activated(m.first(h), first) * activated(m.gate(h), second)), bag()
    )

    expected = {"value_activation": first, "gate_activation": second, "layout": "b n r"}
    either = [GatedSite("first", "gate", "last", **expected)]
    if first == second is None:
        either.append(GatedSite("gate", "first", "last", **expected))
    assert site in either


def test_discovery__siblings_without_a_gate__are_a_gated_site_without_one():
    site = find(Loose(lambda m, h: torch.tanh(m.first(h))), bag())

    assert site == GatedSite("first", None, "last", layout="b n r", value_activation="tanh")


def test_discovery__no_module_owns_the_scorer__shows_candidates_and_kinds():
    with pytest.raises(ValueError, match=r"scores of its softmax come from 'last', but") as error:
        find(Loose(lambda m, h: torch.sin(m.first(h))), bag())

    message = str(error.value)
    assert "perhaps AnchorCallback('last') for that layer alone" in message
    assert "first (1, 7, 6) -> (1, 7, 4); last (1, 7, 4) -> (1, 7, 1)" in message
    for kind in ("GatedSite", "ClassTokenSite", "MultiheadSite", "CriticalInstanceSite"):
        assert kind in message


def test_discovery__attention_of_products__guesses_the_kind():
    class Encoded(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.MultiheadAttention(6, 2, batch_first=True)
            self.wide = nn.Linear(6, 18)
            self.inner.heads = 2
            self.inner.qkv = nn.Linear(6, 18)

        def forward(self, features):
            hidden = self.encoder(features)
            mixed, _ = self.mixer(hidden, hidden, hidden)
            mixed = mixed + self.inner.qkv(hidden)[..., :6] + self.wide(hidden)[..., :6]
            return self.head(mixed[:, 0])

    with pytest.raises(ValueError, match="must be found") as error:
        find(Encoded(), bag())

    assert (
        "perhaps AnchorCallback(MultiheadSite('mixer', class_token=True)) or "
        "AnchorCallback(ClassTokenSite('inner.qkv')): AttentionSite(" in str(error.value)
    )


def test_discovery__several_of_a_list__offers_them_all_in_one_line():
    class Heads(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(3)])

        def forward(self, features):
            hidden = self.encoder(features)
            attention = [head(hidden).softmax(dim=1) for head in self.heads]
            return self.head(sum((a * hidden).sum(dim=1) for a in attention))

    with pytest.raises(ValueError, match=r"or AnchorCallback\(AttentionSite\('heads\.\*', layout="):
        find(Heads(), bag())


def test_discovery__temperature_that_trains__is_refused():
    class Trained(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, features):
            hidden = self.encoder(features)
            scores = self.inner.scorer(hidden) * self.temperature.exp() / torch.e + self.shift
            return self.head((scores.softmax(dim=1) * hidden).sum(dim=1))

    with pytest.raises(ValueError, match=r"'inner\.scorer\.2', and parameters that train"):
        find(Trained(), bag())


class Mean(nn.Module):
    """No attention, but a softmax over as many classes as a bag may have instances."""

    def __init__(self) -> None:
        super().__init__()
        self.instance = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, features):
        return self.instance(features).mean(dim=1)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("n_bags", [1, 2])
@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: nn.functional.cross_entropy(logits, torch.zeros(len(logits)).long()),
        lambda logits: nn.functional.cross_entropy(logits, logits.detach().softmax(1)),
        lambda logits: -logits.softmax(dim=1)[:, 0].log().mean(),
    ],
)
def test_discovery__as_many_instances_as_classes__is_no_attention(n_bags, loss, inside):
    model = nn.Sequential(Mean()) if inside else Mean()

    with pytest.raises(NothingToSeeError):
        find(model, bag(n_bags, 2), loss=loss, n_bags=n_bags)


def test_discovery__penalty_on_all_parameters__is_no_way_around_the_scores():
    model = Plain()
    penalty = 1e-4 * sum(parameter.abs().sum() for parameter in model.parameters())

    site = find(model, bag(), loss=lambda logits: logits.square().sum() + penalty)

    assert site == AttentionSite("inner.scorer", layout="b n r")


def test_discovery__compiled_part__is_named_as_without():
    model = Plain()
    model.inner.scorer = torch.compile(model.inner.scorer, backend="eager")

    site = find(model, bag())

    assert site == AttentionSite("inner.scorer", layout="b n r")
    assert site.find_block(model) is model.inner.scorer


@pytest.mark.parametrize(
    "extra",
    [
        lambda x: (torch.eye(3).to_sparse() / 2.0).to_dense().sum() * x.sum() * 0,
        lambda x: (
            torch.nested.nested_tensor([x[0], x[0, :2]], layout=torch.jagged)
            .sigmoid()
            .values()
            .sum()
            * 0
        ),
        lambda x: (
            nn.functional.scaled_dot_product_attention(
                x.expand(4, -1, -1)[None],
                x.expand(2, -1, -1)[None],
                x.expand(2, -1, -1)[None],
                enable_gqa=True,
            ).sum()
            * 0
        ),
    ],
    ids=["sparse", "nested", "grouped_queries"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_discovery__tensors_without_a_storage_of_their_own__are_passed_over(extra):
    class Extra(Plain):
        def forward(self, features):
            return super().forward(features) + extra(features)

    assert find(Extra(), bag()).block == "inner.scorer"


def test_discovery__frozen_scorer__says_so_and_may_wait():
    model = Plain()
    model.inner.requires_grad_(False)

    with pytest.raises(NothingToSeeError, match=r"'inner\.scorer\.2', whose parameters are frozen"):
        find(model, bag())


def test_discovery__equal_scores__show_nothing():
    model = Plain()
    nn.init.zeros_(model.inner.scorer[-1].weight)

    with pytest.raises(NothingToSeeError, match="equal scores, as of a layer that starts with"):
        find(model, bag())


def test_discovery__convolution_over_instances__has_them_last():
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scorer = nn.Conv1d(5, 1, 1)
            self.head = nn.Linear(5, 2)

        def forward(self, features):
            x = features.mT
            return self.head((self.scorer(x).softmax(dim=-1) * x).sum(dim=-1))

    assert find(Convolved(), bag(2, 7)) == AttentionSite("scorer", layout="b r n")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_discovery__scripted_part__is_passed_over():
    model = Plain()
    model.encoder = torch.jit.script(model.encoder)

    assert find(model, bag()).block == "inner.scorer"
    assert not model._forward_hooks


def test_discovery__no_softmax_over_instances__says_so():
    class Mean(Plain):
        def forward(self, features):
            return self.head(self.encoder(features).mean(dim=1)).softmax(dim=1)

    with pytest.raises(
        ValueError, match="no submodule that ran with gradients put out the argument of a softmax"
    ):
        find(Mean(), bag())


def test_discovery__scorer_inside_another_scorers_block__is_chosen():
    class Outer(nn.Module):
        """Mixes instances by an attention of its own before it scores them."""

        def __init__(self) -> None:
            super().__init__()
            self.scorer = nn.Linear(6, 1)
            self.last = nn.Linear(6, 1)

        def forward(self, hidden):
            context = (self.scorer(hidden).softmax(dim=1) * hidden).sum(dim=1, keepdim=True)
            return self.last(hidden + context)

    class Nested(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.inner.scorer = Outer()

    site = find(Nested(), bag())

    assert site.block == "inner.scorer.scorer"


def test_discovery__leaves_the_model_as_it_was():
    model = Plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()

    find(model, bag())

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
