"""Metrics of bag classification that hold when a class is absent."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassStatScores,
)
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override


def bag_metrics(n_classes: int, prefix: str = "") -> MetricCollection:
    """Build the metrics of a run; update them with probabilities (B, C) and labels (B,).

    - ``f1``: macro F1 over the classes that occur in the labels or the predictions.
    - ``auroc``: one-vs-rest AUROC, averaged over the classes that have both positive and negative
      bags; NaN if there is none. With two classes it is the AUROC of class 1.
    - ``accuracy``: share of bags that are right.
    - ``balanced_accuracy``: recall, averaged over the classes that occur in the labels.

    Args:
        n_classes: Number of classes, at least 2.
        prefix: Put before every key, for instance ``"test/"``.

    Returns:
        The metrics, which synchronise over processes by themselves.

    Raises:
        ValueError: If there are fewer than two classes.

    Example:
        >>> metrics = bag_metrics(3, prefix="test/")
        >>> metrics.update(torch.eye(3)[:2], torch.tensor([0, 1]))  # class 2 is absent
        >>> [round(float(value), 2) for value in metrics.compute().values()]
        [1.0, 1.0, 1.0, 1.0]

    Source:
        scikit-learn's ``f1_score``, ``roc_auc_score`` and ``balanced_accuracy_score``. torchmetrics
        counts an absent class as 0 in the macro AUROC and, if it is predicted, in the macro recall.
    """
    if n_classes < 2:
        raise ValueError(
            f"A bag classifier must have at least 2 classes, but {n_classes} came. Give a model of "
            "one logit n_classes=2, and update with the probabilities of both classes."
        )
    return MetricCollection(
        {
            "f1": MulticlassF1Score(n_classes, average="macro"),
            "auroc": _PresentAUROC(n_classes, average="none"),
            "accuracy": MulticlassAccuracy(n_classes, average="micro"),
            "balanced_accuracy": _PresentRecall(n_classes, average="none"),
        },
        prefix=prefix,
    )


class _PresentAUROC(MulticlassAUROC):
    @override
    def update(self, preds: Float[Tensor, "bag cls"], target: Int[Tensor, " bag"]) -> None:
        # torchmetrics applies a softmax to a batch with a value outside [0, 1], and to no other:
        # the AUROC of logits or NaN would be a number without a meaning.
        if not ((preds >= 0) & (preds <= 1)).all():
            raise ValueError(
                "Metrics must be updated with probabilities, but values outside [0, 1] or NaN "
                "came. Apply a softmax to logits; look for a diverged loss if they are NaN."
            )
        super().update(preds, target)

    @override
    def compute(self) -> Float[Tensor, ""]:  # type: ignore[override]  # as in torchmetrics' own
        preds, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        # With two classes, the two areas differ where only one of the probabilities saturates.
        classes = [1] if self.num_classes == 2 else range(self.num_classes)
        areas = [
            binary_auroc(preds[:, cls], positive.long())
            for cls in classes
            if (positive := target == cls).any() and not positive.all()
        ]
        return torch.stack(areas).mean() if areas else preds.new_full((), torch.nan)


class _PresentRecall(MulticlassStatScores):
    @override
    def compute(self) -> Float[Tensor, ""]:
        true_positive, _, _, _, n_bags = super().compute().unbind(dim=-1)
        present = n_bags > 0
        return (true_positive[present] / n_bags[present]).mean()
