"""Splits of bags into training, validation and test."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of bag indices.

    Args:
        train: Bags that are trained on.
        val: Bags that choose the model.
        test: Bags that only the final figure sees.
    """

    train: list[int]
    val: list[int]
    test: list[int]


def stratified_fold(
    labels: Sequence[int], *, n_folds: int, fold: int, val_fraction: float, seed: int
) -> Split:
    """Split bags for one round of stratified cross-validation.

    The test part is the fold; the validation part is drawn from the other folds, class by class.

    Args:
        labels: Class index of every bag.
        n_folds: Number of folds.
        fold: The fold that is the test part, from 0.
        val_fraction: Share of every class outside the test fold that goes to validation, rounded to
            whole bags.
        seed: Seed of both draws. Equal for all folds of one cross-validation.

    Returns:
        The split. Its parts hold every bag once.

    Raises:
        ValueError: If an argument is out of range, or a class would be missing in a part.
        ModuleNotFoundError: If scikit-learn is not installed.

    Example:
        >>> labels = [0] * 8 + [1] * 4
        >>> split = stratified_fold(labels, n_folds=4, fold=0, val_fraction=0.34, seed=0)
        >>> [labels[index] for index in split.val], [labels[index] for index in split.test]
        ([0, 0, 1], [0, 0, 1])
    """
    try:
        from sklearn.model_selection import StratifiedKFold  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Stratified folds need scikit-learn, which is not installed. "
            "Run: pip install 'mil_anchor[benchmarks]'"
        ) from error
    _check_arguments(labels, n_folds=n_folds, fold=fold, val_fraction=val_fraction)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels)
    outside, inside = list(folds)[fold]

    # Drawn per class: scikit-learn's stratified draw may leave a small class without a bag.
    generator = random.Random(seed)
    train: list[int] = []
    val: list[int] = []
    for label in sorted(set(labels)):
        members = [int(index) for index in outside if labels[index] == label]
        generator.shuffle(members)
        n_val = round(val_fraction * len(members))
        val += members[:n_val]
        train += members[n_val:]
    split = Split(train=sorted(train), val=sorted(val), test=[int(index) for index in inside])
    _check_every_class(labels, split)
    return split


def _check_arguments(
    labels: Sequence[int], *, n_folds: int, fold: int, val_fraction: float
) -> None:
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, but {n_folds} came. Use 5 or 10.")
    if not 0 <= fold < n_folds:
        raise ValueError(
            f"fold must lie in 0..{n_folds - 1}, but {fold} came. Folds are counted from 0."
        )
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"val_fraction must lie between 0 and 1, but {val_fraction} came. Use 0.2, say."
        )
    smallest = min(set(labels), key=labels.count)
    if n_folds > labels.count(smallest):
        raise ValueError(
            f"Every fold needs a bag of every class, but class {smallest} has "
            f"{labels.count(smallest)} bags for {n_folds} folds. Use fewer folds."
        )


def _check_every_class(labels: Sequence[int], split: Split) -> None:
    for part, indices in (("train", split.train), ("val", split.val), ("test", split.test)):
        missing = set(labels) - {labels[index] for index in indices}
        if missing:
            raise ValueError(
                f"Every part needs a bag of every class, but part {part!r} has none of class "
                f"{min(missing)}. Change val_fraction or n_folds, or add bags of that class."
            )
