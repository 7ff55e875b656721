"""CLAM: attention pooling with instance-level clustering (Lu et al., 2021)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baselines.checks import check_bags, check_dropout, check_positive
from baselines.normalization import normalized_scorer, scorer_inputs
from baselines.output import MILOutput
from baselines.pooling import attention_pool, mask_scores
from baselines.scorer import GatedScorer, Projection

_BAG_LOSS_WEIGHT = 0.7


class _Examples(NamedTuple):
    """Which instances of a bag the classifier of a class learns from, and what each is to it."""

    cls: int
    indices: Int[Tensor, " example"]
    target: Int[Tensor, " example"]


class _CLAM(nn.Module):
    """Projection, gated attention and instance clustering; the branches and head come on top."""

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        hidden: int = 512,
        attention_width: int = 256,
        dropout: float = 0.25,
        k_sample: int = 8,
        subtyping: bool = False,
        normalization: str = "softmax",
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features,
            n_classes=n_classes,
            hidden=hidden,
            attention_width=attention_width,
            k_sample=k_sample,
        )
        check_dropout(dropout)
        self.in_features = in_features
        self.n_classes = n_classes
        self.k_sample = k_sample
        self.subtyping = subtyping
        self.projection = Projection(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout))
        n_rows = self._count_rows(n_classes)
        scorer = GatedScorer(hidden, attention_width, n_rows, dropout=dropout)
        self.normalization = normalization
        self.attention = normalized_scorer(scorer, normalization, rows_first=False)
        self.head = nn.Linear(hidden, n_classes)
        self.instance_classifiers = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(n_classes))

    @staticmethod
    def _count_rows(n_classes: int) -> int:
        raise NotImplementedError

    def _classify(self, pooled: Float[Tensor, "bag row hidden"]) -> Float[Tensor, "bag cls"]:
        raise NotImplementedError

    def forward(
        self,
        features: Float[Tensor, "bag instance width"],
        mask: Bool[Tensor, "bag instance"] | None = None,
        label: Int[Tensor, " bag"] | None = None,
    ) -> MILOutput:
        """Classifies a batch of bags; True in the mask marks a real instance.

        With a label the auxiliary loss is 0.3 times the instance loss, averaged over bags.

        Raises:
            ValueError: A bag has no real instance, or the features have another width.
        """
        mask = check_bags(type(self).__name__, self.in_features, features, mask)
        instances = self.projection(features)
        inputs = scorer_inputs(self.normalization, instances, mask=mask)
        scores, instances = self.attention(*inputs)
        scores = mask_scores(rearrange(scores, "b n r -> b r n"), mask)
        logits = self._classify(attention_pool(scores, instances))
        auxiliary_loss = None
        if label is not None:
            # The only row of a single branch serves every class.
            rows = scores.detach().expand(-1, self.n_classes, -1)
            examples = [
                self._examples(*bag)
                for bag in zip(rows, mask.sum(dim=1).tolist(), label.tolist(), strict=True)
            ]
            chosen = _chosen(instances, examples)
            losses = [self._instance_loss(*bag) for bag in zip(chosen, examples, strict=True)]
            auxiliary_loss = (1 - _BAG_LOSS_WEIGHT) * torch.stack(losses).mean()
        return MILOutput(logits, scores, auxiliary_loss, _BAG_LOSS_WEIGHT)

    def _examples(
        self, rows: Float[Tensor, "cls instance"], n_real: int, label: int
    ) -> list[_Examples]:
        """What the instance classifiers learn from a bag, which needs no gradient to be chosen."""
        n_bottom = min(self.k_sample, n_real // 2)
        n_top = max(n_bottom, 1)
        examples = []
        for cls, row in enumerate(rows):
            if cls != label and not self.subtyping:
                continue
            # One order for both ends: two searches could pick the same instance among equal scores.
            # Padding has the score -inf and comes last.
            order = row.argsort(descending=True, stable=True)[:n_real]
            top, bottom = order[:n_top], order[n_real - n_bottom :]
            indices = torch.cat([top, bottom]) if cls == label else top
            target = torch.zeros_like(indices)
            if cls == label:
                target[:n_top] = 1
            examples.append(_Examples(cls, indices, target))
        return examples

    def _instance_loss(
        self, chosen: Float[Tensor, "chosen hidden"], examples: Sequence[_Examples]
    ) -> Float[Tensor, ""]:
        loss = chosen.new_zeros(())
        for own, (cls, _, target) in zip(_by_class(chosen, examples), examples, strict=True):
            loss = loss + F.cross_entropy(self.instance_classifiers[cls](own), target)
        return loss / self.n_classes if self.subtyping else loss


def _chosen(
    instances: Float[Tensor, "bag instance hidden"], examples: Sequence[Sequence[_Examples]]
) -> Float[Tensor, "bag chosen hidden"]:
    """The examples of each bag, those of one class after those of another, and zeros.

    They are pooled, each with an attention of its own that is a single one: the gradient is one
    product, where that of indexing is written three times, and zero but for a few instances.
    """
    n_chosen = max(sum(_sizes(of_bag)) for of_bag in examples)
    rows = instances.new_zeros(len(instances), n_chosen, instances.shape[1])
    for bag, of_bag in zip(rows, examples, strict=True):
        for own, (_, indices, _) in zip(_by_class(bag, of_bag), of_bag, strict=True):
            own.scatter_(1, indices[:, None], 1)
    return torch.bmm(rows, instances)


def _by_class(rows: Tensor, examples: Sequence[_Examples]) -> tuple[Tensor, ...]:
    """The rows of a bag's examples, class by class; those behind them are another bag's excess."""
    sizes = _sizes(examples)
    return torch.split(rows[: sum(sizes)], sizes)


def _sizes(examples: Sequence[_Examples]) -> list[int]:
    return [len(indices) for _, indices, _ in examples]


class CLAMSB(_CLAM):
    """CLAM with a single attention branch: one row of scores pools the bag for every class.

    The attention block is the submodule ``attention``: projected instances (bag, instance, hidden)
    to raw scores (bag, instance, row), here of one row, and, to be pooled, the instances
    themselves.

    Instance loss of a bag: its k instances of highest and its k of lowest score are to be told
    apart, as evidence for and against the bag's class, by that class's binary instance classifier;
    with ``subtyping``, where classes exclude each other, the k highest are also negative examples
    for the classifier of every other class, and the sum is divided by the number of classes.

    Args:
        in_features: Width of the instance features.
        n_classes: Number of classes.
        hidden: Width of the projected instances.
        attention_width: Width inside the scorer.
        dropout: Dropout after the projection and inside the scorer.
        k_sample: How many instances the instance loss takes from each end.
        subtyping: Whether the classes exclude each other, so that the instance loss of the other
            classes is added.
        normalization: How scores become attention: ``"softmax"``, ``"nsf"`` or ``"mixture"``; see
            `normalized_scorer`. All rank the instances of a row alike for the instance loss.

    Raises:
        ValueError: A count is not positive, ``dropout`` lies outside [0, 1), or ``normalization``
            is unknown.

    Example:
        >>> import torch
        >>> output = CLAMSB(6, 2)(torch.randn(1, 5, 6), label=torch.tensor([1]))
        >>> output.logits.shape, output.scores.shape, output.auxiliary_loss.shape
        (torch.Size([1, 2]), torch.Size([1, 1, 5]), torch.Size([]))

    Source: Lu, Williamson, Chen, Chen, Barbieri, Mahmood, *Data-efficient and weakly supervised
    computational pathology on whole-slide images*, Nature Biomedical Engineering 2021. Differences
    from the authors' code:

    - cross-entropy in place of the smooth top-1 SVM: for two classes and temperature 1 that loss is
      the cross-entropy with a margin of one added to the wrong class, and it would need a
      dependency that no package index carries; the authors offer cross-entropy as an option;
    - a bag of n instances takes ``min(k, n // 2)`` from each end, so that no instance is both
      positive and negative; upstream fails below k instances and lets the ends overlap below 2k.
      The instance of a bag of one is taken as positive: it is all the evidence that there is;
    - dropout defaults to the paper's 0.25; recent releases of the code default to none, and inside
      the scorer know only 0 and 0.25;
    - linear layers keep PyTorch's initialisation, as in recent releases of the code;
    - batches and masks; upstream takes one bag. The instance loss is averaged over bags.
    """

    @staticmethod
    def _count_rows(n_classes: int) -> int:  # noqa: ARG004 (the other model's rows depend on it)
        return 1

    def _classify(self, pooled: Float[Tensor, "bag row hidden"]) -> Float[Tensor, "bag cls"]:
        logits: Tensor = self.head(pooled[:, 0])
        return logits


class CLAMMB(_CLAM):
    """CLAM with one attention branch per class: row c pools the bag that class c is judged by.

    The attention block is the submodule ``attention``: projected instances (bag, instance, hidden)
    to raw scores (bag, instance, row), one row per class, and, to be pooled, the instances
    themselves.

    The instance loss of class c ranks the instances by row c; everything else, the source and the
    differences from it are those of `CLAMSB`.

    Args:
        in_features: Width of the instance features.
        n_classes: Number of classes.
        hidden: Width of the projected instances.
        attention_width: Width inside the scorer.
        dropout: Dropout after the projection and inside the scorer.
        k_sample: How many instances the instance loss takes from each end.
        subtyping: Whether the classes exclude each other, so that the instance loss of the other
            classes is added.
        normalization: How scores become attention: ``"softmax"``, ``"nsf"`` or ``"mixture"``; see
            `normalized_scorer`. All rank the instances of a row alike for the instance loss.

    Raises:
        ValueError: A count is not positive, ``dropout`` lies outside [0, 1), or ``normalization``
            is unknown.

    Example:
        >>> import torch
        >>> CLAMMB(6, 3)(torch.randn(1, 5, 6)).scores.shape
        torch.Size([1, 3, 5])
    """

    @staticmethod
    def _count_rows(n_classes: int) -> int:
        return n_classes

    def _classify(self, pooled: Float[Tensor, "bag row hidden"]) -> Float[Tensor, "bag cls"]:
        # Class c's linear layer reads row c only; the other entries cost next to nothing.
        logits: Tensor = self.head(pooled)
        return logits.diagonal(dim1=1, dim2=2)
