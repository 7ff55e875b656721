"""ABMIL: attention pooling of instances (Ilse et al., 2018)."""

from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baselines.checks import check_bags, check_dropout, check_positive
from baselines.normalization import normalized_scorer, scorer_inputs
from baselines.output import MILOutput
from baselines.pooling import attention_pool, mask_scores
from baselines.scorer import GatedScorer, Projection, TanhScorer


class ABMIL(nn.Module):
    """Classifies the attention-weighted mean of a bag's instances.

    ``z = sum_i softmax(s)_i h_i`` with ``h = relu(W x)`` and scores s of a `GatedScorer` or a
    `TanhScorer`; several rows give the mean of their z; a linear layer classifies z.

    The attention block is the submodule ``attention``: projected instances (bag, instance, hidden)
    to raw scores (bag, instance, row) and, to be pooled, the instances themselves.

    Args:
        in_features: Width of the instance features.
        n_classes: Number of classes.
        hidden: Width of the projected instances.
        attention_width: Width inside the scorer.
        n_rows: Number of attention rows.
        gated: Whether the scorer is gated (eq. 9) or a plain tanh (eq. 8).
        dropout: Dropout after the projection.
        normalization: How scores become attention: ``"softmax"``, ``"nsf"`` or ``"mixture"``; see
            `normalized_scorer`.

    Raises:
        ValueError: A count is not positive, ``dropout`` lies outside [0, 1), or ``normalization``
            is unknown.

    Example:
        >>> import torch
        >>> output = ABMIL(6, 2, n_rows=3)(torch.randn(4, 5, 6))
        >>> output.logits.shape, output.scores.shape
        (torch.Size([4, 2]), torch.Size([4, 3, 5]))

    Source: Ilse, Tomczak, Welling, *Attention-based Deep Multiple Instance Learning*, ICML 2018,
    eq. 7-9. Differences from the authors' code, which reads images of digits:

    - instances are precomputed features behind one linear layer, not images behind a small
      convolutional network: whole slides come as features;
    - dropout after that layer, off by default, since pathology pipelines use it;
    - one logit per class and no sigmoid, so that more than two classes train by cross-entropy;
    - several rows are averaged; the authors' code fixes one row;
    - batches and masks; the authors' code takes one bag.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        hidden: int = 512,
        attention_width: int = 128,
        n_rows: int = 1,
        gated: bool = True,
        dropout: float = 0.0,
        normalization: str = "softmax",
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features,
            n_classes=n_classes,
            hidden=hidden,
            attention_width=attention_width,
            n_rows=n_rows,
        )
        check_dropout(dropout)
        self.in_features = in_features
        self.projection = Projection(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout))
        scorer = GatedScorer if gated else TanhScorer
        self.normalization = normalization
        self.attention = normalized_scorer(
            scorer(hidden, attention_width, n_rows), normalization, rows_first=False
        )
        self.head = nn.Linear(hidden, n_classes)

    def forward(
        self,
        features: Float[Tensor, "bag instance width"],
        mask: Bool[Tensor, "bag instance"] | None = None,
        label: Int[Tensor, " bag"] | None = None,  # noqa: ARG002 (all baselines are called alike)
    ) -> MILOutput:
        """Classifies a batch of bags; True in the mask marks a real instance.

        Raises:
            ValueError: A bag has no real instance, or the features have another width.
        """
        mask = check_bags("ABMIL", self.in_features, features, mask)
        instances = self.projection(features)
        inputs = scorer_inputs(self.normalization, instances, mask=mask)
        scores, instances = self.attention(*inputs)
        scores = mask_scores(rearrange(scores, "b n r -> b r n"), mask)
        pooled = attention_pool(scores, instances).mean(dim=1)
        return MILOutput(self.head(pooled), scores)
