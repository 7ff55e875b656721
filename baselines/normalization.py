"""Online attention by another normalisation than the softmax: eq. 5 and eq. 34 of ASMIL."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from baselines.checks import check_choice

# Scores, alone or with the instances that the scorer hands on to be pooled.
Scored = Float[Tensor, "bag _ _"] | tuple[Float[Tensor, "bag _ _"], Float[Tensor, "bag _ _"]]


def normalized_scorer(scorer: nn.Module, normalization: str, *, rows_first: bool) -> nn.Module:
    """Gives a scorer whose *effective* scores' softmax is the attention that is asked for.

    What pools the bag stays a softmax over the instances, so a site, its proof, the monitor and
    every plug-in read the attention that the model uses, and nothing else of the model changes.
    The effective scores rise with the raw ones: they rank the instances of a row alike.

    TransMIL has no such option: it takes no softmax of its scores, which are a surrogate.

    Args:
        scorer: Inputs to raw scores z.
        normalization: ``"softmax"`` gives the scorer itself; ``"nsf"`` a `SigmoidScorer`;
            ``"mixture"`` a `MixtureScorer`, to be called with the mask (see `scorer_inputs`).
        rows_first: Whether the scores are (bag, row, instance) and not (bag, instance, row).

    Raises:
        ValueError: The normalisation is unknown.

    Source: ASMIL (arXiv 2603.06658), eq. 5 and 34. A plug-in whose target is not the softmax gets
    the effective scores of the anchor too, where the paper would give it raw ones.
    """
    check_choice("normalization", normalization, ("softmax", "nsf", "mixture"))
    if normalization == "softmax":
        return scorer
    if normalization == "nsf":
        return SigmoidScorer(scorer)
    return MixtureScorer(scorer, rows_first=rows_first)


def scorer_inputs(
    normalization: str,
    *inputs: Tensor,
    mask: Bool[Tensor, "bag instance"],
) -> tuple[Tensor, ...]:
    """What a scorer of this normalisation is called with: a mixture also needs the mask."""
    return (*inputs, mask) if normalization == "mixture" else inputs


class SigmoidScorer(nn.Module):
    """Effective scores ``log sigmoid(z)``: their softmax is the normalized sigmoid (NSF) of z.

    ``NSF(z)_i = sigmoid(z_i) / sum_j sigmoid(z_j)``.

    Args:
        scorer: Inputs to raw scores z.

    Source: ASMIL (arXiv 2603.06658), eq. 5.
    """

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, *inputs: Tensor) -> Scored:
        """Returns the effective scores in the scorer's layout, and what it hands on."""
        return _with_scores(F.logsigmoid, self.scorer(*inputs))


class MixtureScorer(nn.Module):
    """Effective scores ``log(lambda softmax(z) + (1 - lambda) NSF(z))``, normalised already.

    ``lambda = sigmoid(share)`` with one learned number ``share``, which starts at 0: half and half.

    Args:
        scorer: Inputs to raw scores z.
        rows_first: Whether the scores are (bag, row, instance) and not (bag, instance, row).

    Source: ASMIL (arXiv 2603.06658), eq. 34.
    """

    def __init__(self, scorer: nn.Module, *, rows_first: bool) -> None:
        super().__init__()
        self.scorer = scorer
        self.rows_first = rows_first
        self.share = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Goes back to half and half."""
        nn.init.zeros_(self.share)

    def forward(self, *inputs: Tensor) -> Scored:
        """Returns the effective scores, ``-inf`` on padding, in the scorer's layout.

        What the scorer hands on beside them comes with them.

        Args:
            inputs: Those of the scorer and, last, the mask (bag, instance); True marks a real
                instance.
        """
        *features, mask = inputs
        return _with_scores(lambda scores: self._mix(scores, mask), self.scorer(*features))

    def _mix(
        self, scores: Float[Tensor, "bag _ _"], mask: Bool[Tensor, "bag instance"]
    ) -> Float[Tensor, "bag _ _"]:
        axis, other = (2, 1) if self.rows_first else (1, 2)
        padding = ~mask.unsqueeze(other)
        log_softmax, log_nsf = (
            # Padding gets a finite number until the end: logaddexp(-inf, -inf) has a NaN gradient.
            F.log_softmax(z.masked_fill(padding, -torch.inf), dim=axis).masked_fill(padding, 0)
            for z in (scores, F.logsigmoid(scores))
        )
        mixture = torch.logaddexp(
            F.logsigmoid(self.share) + log_softmax, F.logsigmoid(-self.share) + log_nsf
        )
        return mixture.masked_fill(padding, -torch.inf)


def _with_scores(function: Callable[[Tensor], Tensor], scored: Scored) -> Scored:
    """What a scorer returned, with the function of its scores in their place."""
    if isinstance(scored, Tensor):
        return function(scored)
    scores, instances = scored
    return function(scores), instances
