"""The attention scorers of Ilse et al. (2018), which ABMIL and CLAM share."""

from jaxtyping import Float
from torch import Tensor, nn


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
        self.value = nn.Sequential(nn.Linear(width, attention_width), nn.Tanh())
        self.score = nn.Linear(attention_width, n_rows)

    def forward(
        self, features: Float[Tensor, "bag instance width"]
    ) -> Float[Tensor, "bag instance row"]:
        """Returns raw scores: neither masked nor normalised."""
        scores: Tensor = self.score(self.value(features))
        return scores


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
        self.value = nn.Sequential(
            nn.Linear(width, attention_width), nn.Tanh(), nn.Dropout(dropout)
        )
        self.gate = nn.Sequential(
            nn.Linear(width, attention_width), nn.Sigmoid(), nn.Dropout(dropout)
        )
        self.score = nn.Linear(attention_width, n_rows)

    def forward(
        self, features: Float[Tensor, "bag instance width"]
    ) -> Float[Tensor, "bag instance row"]:
        """Returns raw scores: neither masked nor normalised."""
        scores: Tensor = self.score(self.value(features) * self.gate(features))
        return scores
