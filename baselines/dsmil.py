"""DSMIL: an instance stream and a bag stream that attends by similarity (Li et al., 2021)."""

import math

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baselines.checks import check_bags, check_positive
from baselines.normalization import normalized_scorer, scorer_inputs
from baselines.output import MILOutput
from baselines.pooling import attention_pool, mask_scores

_BAG_LOSS_WEIGHT = 0.5


class CriticalAttention(nn.Module):
    """Scores each instance by ``q(x)^T q(x_c) / sqrt(d)``, its likeness to a critical instance.

    q is a network of two layers, applied to both sides, and d the width of its output.

    Args:
        width: Width of the instance features x.
        attention_width: Width d of the queries.
    """

    def __init__(self, width: int, attention_width: int) -> None:
        super().__init__()
        self.query = nn.Sequential(
            nn.Linear(width, attention_width),
            nn.ReLU(),
            nn.Linear(attention_width, attention_width),
            nn.Tanh(),
        )

    def forward(
        self,
        features: Float[Tensor, "bag instance width"],
        critical: Float[Tensor, "bag cls width"],
    ) -> Float[Tensor, "bag cls instance"]:
        """Returns raw scores, one row per critical instance: neither masked nor normalised."""
        queries: Tensor = self.query(features)
        critical_queries: Tensor = self.query(critical)
        # Instances first: the gradient of the queries is then contiguous.
        products = queries @ critical_queries.mT
        return rearrange(products, "b n c -> b c n") / math.sqrt(queries.shape[-1])


class DSMIL(nn.Module):
    """Finds each class's critical instance and pools the bag by likeness to it.

    A linear layer scores every instance for every class; the best instance of a class is its
    critical one and gives the instance stream's logit. Bag stream: row c of the attention,
    ``softmax_i(q(x_i)^T q(x_c) / sqrt(d))``, pools the bag for class c, and a 1-D convolution over
    the whole width reads the pooled rows. Loss: half bag stream, half instance stream.

    The attention block is the submodule ``attention``: instance features (bag, instance, width) and
    critical features (bag, cls, width) to raw scores (bag, row, instance), one row per class.

    ``logits`` are the bag stream's in training mode, where the caller takes their cross-entropy,
    and the mean of both streams' in evaluation mode, where they are the prediction.

    Args:
        in_features: Width of the instance features, which are used as they are.
        n_classes: Number of classes.
        attention_width: Width d of the queries.
        normalization: How scores become attention: ``"softmax"``, ``"nsf"`` or ``"mixture"``; see
            `normalized_scorer`.

    Raises:
        ValueError: A count is not positive, or ``normalization`` is unknown.

    Example:
        >>> import torch
        >>> output = DSMIL(6, 2)(torch.randn(1, 5, 6), label=torch.tensor([1]))
        >>> output.logits.shape, output.scores.shape, output.auxiliary_loss.shape
        (torch.Size([1, 2]), torch.Size([1, 2, 5]), torch.Size([]))

    Source: Li, Li, Eliceiri, *Dual-stream Multiple Instance Learning Network for Whole Slide Image
    Classification with Self-supervised Contrastive Learning*, CVPR 2021. As in the authors' code
    and unlike the paper, q has two layers and a tanh, the products are divided by sqrt(d), and the
    features are pooled without a value layer. Differences from that code:

    - softmax cross-entropy over the classes in place of one binary cross-entropy per class, to
      train like the other baselines;
    - the prediction averages the streams' logits, which is the paper's score of a bag; the code
      averages their sigmoids, and only on request;
    - critical instances by argmax and not by a sort: same instance, less work;
    - batches and masks: a padded instance is never critical. Upstream takes one bag.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        attention_width: int = 128,
        normalization: str = "softmax",
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features, n_classes=n_classes, attention_width=attention_width
        )
        self.in_features = in_features
        self.instance_classifier = nn.Linear(in_features, n_classes)
        self.normalization = normalization
        self.attention = normalized_scorer(
            CriticalAttention(in_features, attention_width), normalization, rows_first=True
        )
        self.head = nn.Conv1d(n_classes, n_classes, kernel_size=in_features)

    def forward(
        self,
        features: Float[Tensor, "bag instance width"],
        mask: Bool[Tensor, "bag instance"] | None = None,
        label: Int[Tensor, " bag"] | None = None,
    ) -> MILOutput:
        """Classifies a batch of bags; True in the mask marks a real instance.

        With a label the auxiliary loss is half the instance stream's cross-entropy.

        Raises:
            ValueError: A bag has no real instance, or the features have another width.
        """
        mask = check_bags("DSMIL", self.in_features, features, mask)
        instance_logits = rearrange(self.instance_classifier(features), "b n c -> b c n")
        critical_logits, index = mask_scores(instance_logits, mask).max(dim=-1)
        critical = features.gather(1, index[..., None].expand(-1, -1, self.in_features))
        inputs = scorer_inputs(self.normalization, features, critical, mask=mask)
        scores = mask_scores(self.attention(*inputs), mask)
        bag_logits = self.head(attention_pool(scores, features)).squeeze(-1)
        logits = bag_logits if self.training else (bag_logits + critical_logits) / 2
        auxiliary_loss = None
        if label is not None:
            auxiliary_loss = (1 - _BAG_LOSS_WEIGHT) * F.cross_entropy(critical_logits, label)
        return MILOutput(logits, scores, auxiliary_loss, _BAG_LOSS_WEIGHT)
