"""The attention scorers of Ilse et al. (2018), which ABMIL and CLAM share."""

from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from baselines.fused import can_fuse, fused_gated_scores, fused_projection
from baselines.tanh import Tanh

# Instances of a batch from which a fused pass is the faster one, without dropout and with: in a
# smaller batch a function of autograd that is written in Python costs more than it saves.
FEWEST_TO_FUSE = {False: 1500, True: 200}
_PROJECTION_PARTS = (nn.Linear, nn.ReLU, nn.Dropout)
_GATED_PARTS = (
    *(nn.Sequential, nn.Linear, Tanh, nn.Dropout),
    *(nn.Sequential, nn.Linear, nn.Sigmoid, nn.Dropout),
    nn.Linear,
)


class Projection(nn.Sequential):
    """Makes hidden instances ``h = dropout(relu(W x))`` of features x.

    Args:
        layers: The linear layer W, the ReLU and the dropout.
    """

    @override
    def forward(self, features: Float[Tensor, "*axis width"]) -> Float[Tensor, "*axis hidden"]:
        """Returns the hidden instances."""
        if features.ndim == 3 and _should_fuse(self, features, _PROJECTION_PARTS):
            # Indexing forgets the classes of the parts.
            return fused_projection(features, cast(nn.Linear, self[0]), cast(nn.Dropout, self[2]))
        hidden: Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return hidden


class TanhScorer(nn.Module):
    """Scores each instance by ``w^T tanh(V h)``, the softmax's argument in eq. 8 of the paper.

    Args:
        width: Width of the instance features h.
        attention_width: Rows of V.
        n_rows: Number of score rows, each with its own w.

    Source: Ilse, Tomczak, Welling, *Attention-based Deep Multiple Instance Learning*, ICML 2018.
    V and w carry a bias, as in the authors' code and unlike the equation.
    """

    def __init__(self, width: int, attention_width: int, n_rows: int) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(width, attention_width), Tanh())
        self.score = nn.Linear(attention_width, n_rows)

    def forward(
        self, features: Float[Tensor, "bag instance width"]
    ) -> tuple[Float[Tensor, "bag instance row"], Float[Tensor, "bag instance width"]]:
        """Returns raw scores, neither masked nor normalised, and the features to be pooled."""
        return self.score(self.value(features)), features


class GatedScorer(nn.Module):
    """Scores each instance by ``w^T (tanh(V h) * sigmoid(U h))``, eq. 9 of the paper.

    Args:
        width: Width of the instance features h.
        attention_width: Rows of V and of U.
        n_rows: Number of score rows, each with its own w.
        dropout: Probability of dropping an entry of either factor (CLAM; the paper has none).

    Source: as for `TanhScorer`; U carries a bias, too.
    """

    def __init__(
        self, width: int, attention_width: int, n_rows: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(width, attention_width), Tanh(), nn.Dropout(dropout))
        self.gate = nn.Sequential(
            nn.Linear(width, attention_width), nn.Sigmoid(), nn.Dropout(dropout)
        )
        self.score = nn.Linear(attention_width, n_rows)

    def forward(
        self, features: Float[Tensor, "bag instance width"]
    ) -> tuple[Float[Tensor, "bag instance row"], Float[Tensor, "bag instance width"]]:
        """Returns raw scores, neither masked nor normalised, and the features to be pooled."""
        if _should_fuse(self, features, _GATED_PARTS):
            value, gate = (cast(nn.Linear, factor[0]) for factor in (self.value, self.gate))
            dropouts = (cast(nn.Dropout, factor[2]) for factor in (self.value, self.gate))
            return fused_gated_scores(features, value, gate, self.score, *dropouts)
        return self.score(self.value(features) * self.gate(features)), features


def _should_fuse(module: nn.Module, features: Tensor, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a fused pass is faster than the module's parts, and does what they would do.

    Nobody may have put another layer in place of one, added one, left out a bias, or set a hook.
    """
    parts = list(module.modules())[1:]
    if [type(part) for part in parts] != list(kinds):
        return False
    drops = any(part.training and part.p > 0 for part in parts if isinstance(part, nn.Dropout))
    return (
        can_fuse(features)  # Before the size, of which torch.compile would make a case each.
        and features.shape[:-1].numel() >= FEWEST_TO_FUSE[drops]
        and all(part.bias is not None for part in parts if isinstance(part, nn.Linear))
        and not any(_is_watched(part) for part in parts)
    )


def _is_watched(part: nn.Module) -> bool:
    of_forward = part._forward_hooks or part._forward_pre_hooks
    return bool(of_forward or part._backward_hooks or part._backward_pre_hooks)
