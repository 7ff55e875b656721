"""All small models of our own: those of published code, and what else a user may bring."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.case import Case
from tests.models.traps_kinds import KINDS
from tests.models.traps_scores import (
    SCORES,
    Batch,
    builder,
    features_of,
    relu,
    tanh_scores,
    trident_loss,
)


def _scorer(rows: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, rows))


class Plain(nn.Module):
    """An encoder, a scorer under a name that says nothing, and a classifier."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.relevance = _scorer()
        self.head = nn.Linear(16, 2)

    def encode(self, features: Tensor) -> Tensor:
        """What the scorer sees and the attention weights."""
        return self.encoder(features)

    def attend(self, h: Tensor) -> Tensor:
        """The attention, (bag, instance, 1)."""
        return self.relevance(h).softmax(dim=1)

    def forward(self, features):
        h = self.encode(features)
        return self.head((self.attend(h) * h).sum(dim=1))


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(features_of(model, batch)), batch["label"])


def _scores(model: Plain, batch: Batch) -> list[Tensor]:
    h = relu(model.encoder[0], features_of(model, batch))
    return [tanh_scores(h, model.relevance[0], model.relevance[2])]


class InPlaceMask(Plain):
    """Masks in place, so that what a hook kept is masked too."""

    def forward(self, features, attn_mask):
        h = self.encoder(features)
        scores = self.relevance(h).squeeze(-1)
        scores.masked_fill_(~attn_mask, -1e9)
        attention = torch.softmax(scores, dim=-1)
        return self.head(torch.einsum("bn,bnd->bd", attention, h))


class StoredAttention(Plain):
    """Keeps its last attention with its graph: no copy can be made after a forward."""

    attention_map: Tensor | None = None

    def attend(self, h: Tensor) -> Tensor:
        self.attention_map = F.softmax(self.relevance(h), dim=1)
        return self.attention_map


class SoftmaxModule(Plain):
    """Normalises by an nn.Softmax."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        self.normalise = nn.Softmax(dim=1)

    def attend(self, h: Tensor) -> Tensor:
        return self.normalise(self.relevance(h))


class SoftmaxInside(Plain):
    """Its Sequential ends in an nn.Softmax, so its output is probabilities."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        self.relevance.append(nn.Softmax(dim=1))

    def attend(self, h: Tensor) -> Tensor:
        return self.relevance(h)


class Temperature(Plain):
    """Divides its scores by a number that stands in forward only."""

    def attend(self, h: Tensor) -> Tensor:
        return torch.softmax(self.relevance(h) / 2, dim=1)


def _temperature_scores(model: Temperature, batch: Batch) -> list[Tensor]:
    return [0.5 * scores for scores in _scores(model, batch)]


class LogSoftmax(Plain):
    """Normalises in the log."""

    def attend(self, h: Tensor) -> Tensor:
        return F.log_softmax(self.relevance(h), dim=1).exp()


class ManyFlat(Plain):
    """Scores the instances of all bags in one long list."""

    def attend(self, h: Tensor) -> Tensor:
        return self.relevance(h.flatten(0, 1)).view(*h.shape[:2], 1).softmax(dim=1)


class InstancesFirst(Plain):
    """Works on (instance, bag, width)."""

    def forward(self, features):
        h = self.encoder(features.transpose(0, 1))
        return self.head((torch.softmax(self.relevance(h), dim=0) * h).sum(dim=0))


class MappingScorer(nn.Module):
    """Returns a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.score = nn.Linear(16, 8), nn.Linear(8, 1)

    def forward(self, h):
        hidden = torch.tanh(self.hidden(h))
        return {"hidden": hidden, "scores": self.score(hidden).squeeze(-1)}


class MappingOutput(Plain):
    """Its scorer returns a mapping, with scores of two axes."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        self.relevance = MappingScorer()

    def attend(self, h: Tensor) -> Tensor:
        return self.relevance(h)["scores"].softmax(dim=-1)[..., None]


def _mapping_scores(model: Plain, batch: Batch) -> list[Tensor]:
    h = relu(model.encoder[0], features_of(model, batch))
    return [tanh_scores(h, model.relevance.hidden, model.relevance.score)]


class ProbabilityModule(nn.Module):
    """Returns probabilities; its scores are inside."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.score = nn.Linear(16, 8), nn.Linear(8, 1)

    def forward(self, h):
        return F.softmax(self.score(torch.tanh(self.hidden(h))), dim=1)


class Probabilities(Plain):
    """Its attention module returns probabilities."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        self.relevance = ProbabilityModule()

    def attend(self, h: Tensor) -> Tensor:
        return self.relevance(h)


class Inner(nn.Module):
    """A scorer whose layers are called f and g."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.g(torch.tanh(self.f(x)))


class Middle(nn.Module):
    """Scores and pools what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.c = Inner()

    def forward(self, x):
        return (torch.softmax(self.c(x), dim=1).mT @ x).flatten(1)


class Outer(nn.Module):
    """Encodes, then hands on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 16), Middle()

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Nested(nn.Module):
    """A scorer three levels deep, under names that do not help, with two rows."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.m, self.o = Outer(width), nn.Linear(32, 2)

    def forward(self, x):
        return self.o(self.m(x))


def _nested_scores(model: Nested, batch: Batch) -> list[Tensor]:
    h = relu(model.m.a, features_of(model, batch))
    return [tanh_scores(h, model.m.b.c.f, model.m.b.c.g)]


class BehindSelfAttention(Plain):
    """Its encoder attends from instance to instance, by a softmax over instances of its own."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def encode(self, features: Tensor) -> Tensor:
        h = self.encoder(features)
        return h + torch.softmax(self.query(h) @ self.key(h).mT / 4, dim=-1) @ h


def _behind_scores(model: BehindSelfAttention, batch: Batch) -> list[Tensor]:
    h = model.encode(features_of(model, batch))
    return [tanh_scores(h, model.relevance[0], model.relevance[2])]


OTHERS = [
    Case(
        name="sequential",
        build=builder(Plain, "relevance.2"),
        loss=_loss,
        scores=_scores,
        site='AttentionSite("relevance")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="in_place_mask",
        build=builder(InPlaceMask, "relevance.2"),
        loss=trident_loss,
        scores=_scores,
        site='AttentionSite("relevance", layout="b n r")',
        found="relevance",
        n_bags=3,
        padded=True,
    ),
    Case(
        name="stored_attention",
        build=builder(StoredAttention, "relevance.2"),
        loss=_loss,
        scores=_scores,
        site='AttentionSite("relevance", layout="b n r")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="softmax_module",
        build=builder(SoftmaxModule, "relevance.2"),
        loss=_loss,
        scores=_scores,
        site='AttentionSite("relevance", layout="b n r")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="softmax_inside",
        build=builder(SoftmaxInside, "relevance.2"),
        loss=_loss,
        scores=_scores,
        site='AttentionSite("relevance", tap="2", layout="b n r")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="temperature",
        build=builder(Temperature, "relevance.2", factor=24.0),
        loss=_loss,
        scores=_temperature_scores,
        site='AttentionSite("relevance", layout="b n r", scale=0.5)',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="log_softmax",
        build=builder(LogSoftmax, "relevance.2"),
        loss=_loss,
        scores=_scores,
        site='AttentionSite("relevance", layout="b n r")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="many_flat",
        build=builder(ManyFlat, "relevance.2"),
        loss=_loss,
        scores=_scores,
        site='AttentionSite("relevance", layout="(b n) r")',
        found="relevance",
        n_bags=3,
    ),
    Case(
        name="instances_first",
        build=builder(InstancesFirst, "relevance.2"),
        loss=_loss,
        scores=_scores,
        site='AttentionSite("relevance", layout="n b r")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="mapping_output",
        build=builder(MappingOutput, "relevance.score"),
        loss=_loss,
        scores=_mapping_scores,
        site='AttentionSite("relevance", layout="b n", output="scores")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="probabilities",
        build=builder(Probabilities, "relevance.score"),
        loss=_loss,
        scores=_mapping_scores,
        site='AttentionSite("relevance", tap="score", layout="b n r")',
        found="relevance",
        n_bags=2,
    ),
    Case(
        name="nested",
        build=builder(Nested, "m.b.c.g"),
        loss=_loss,
        scores=_nested_scores,
        site='AttentionSite("m.b.c", layout="b n r")',
        found="m.b.c",
        n_bags=2,
    ),
    Case(
        name="behind_self_attention",
        build=builder(BehindSelfAttention, "relevance.2"),
        loss=_loss,
        scores=_behind_scores,
        site='AttentionSite("relevance", layout="b n r")',
        found="relevance",
        n_bags=2,
    ),
]

TRAPS: list[Case] = [*SCORES, *OTHERS, *KINDS]
