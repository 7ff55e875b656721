"""Splits of bags into training, validation and test."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_utilities.core.rank_zero import rank_zero_warn

from mil_anchor.data.labels import PARTS, LabelTable

# Draws that are compared where whole cases are drawn: they differ in size and in what they hold.
_N_DRAWS = 50


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

    @property
    def parts(self) -> dict[str, list[int]]:
        """The lists by name."""
        return {part: getattr(self, part) for part in PARTS}


def stratified_fold(
    labels: Sequence[int],
    *,
    n_folds: int,
    fold: int,
    val_fraction: float,
    seed: int,
    cases: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Split:
    """Split bags for one round of stratified cross-validation, cases kept together.

    The test part is the fold; the validation part is drawn from the other folds, class by class.

    Args:
        labels: Class index of every bag.
        n_folds: Number of folds.
        fold: The fold that is the test part, from 0.
        val_fraction: Share of every class outside the test fold that goes to validation, rounded to
            whole bags; with cases, as `draw_validation` does it.
        seed: Seed of both draws. Equal for all folds of one cross-validation.
        cases: The case of every bag; by default every bag is its own.
        classes: Names of the classes for errors; by default their indices.

    Returns:
        The split. Its parts hold every bag once, and every case in one part. With cases of several
        bags, the test part may lack a class.

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
        from sklearn.model_selection import (  # type: ignore[import-untyped]
            StratifiedGroupKFold,
            StratifiedKFold,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Stratified folds need scikit-learn, which is not installed. "
            "Run: pip install 'mil_anchor[benchmarks]'"
        ) from error
    names = classes or [str(label) for label in range(1 + max(labels))]
    _check_folds(labels, cases, names=names, n_folds=n_folds, fold=fold)
    grouped = cases is not None and len(set(cases)) < len(labels)
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    folds = kind(n_folds, shuffle=True, random_state=seed).split(
        labels, labels, cases if grouped else None
    )
    outside, inside = ([int(index) for index in part] for part in list(folds)[fold])
    train, val = draw_validation(labels, outside, cases=cases, val_fraction=val_fraction, seed=seed)
    split = Split(train=train, val=val, test=inside)
    _check_every_class(labels, split, names=names)
    return split


def draw_validation(
    labels: Sequence[int],
    members: Sequence[int],
    *,
    cases: Sequence[str] | None = None,
    val_fraction: float,
    seed: int,
) -> tuple[list[int], list[int]]:
    """Draw the validation part from some bags, class by class.

    Without cases, val_fraction of every class is drawn, rounded to whole bags. With cases, whole
    cases are drawn, each in the name of its rarest class: val_fraction of all, and where a class
    has two cases at least one and not all. Of 50 such draws, the first with most classes in both
    parts, and then with class counts closest to val_fraction, is taken.

    Args:
        labels: Class index of every bag.
        members: Indices of the bags to draw from; the others belong to the test part.
        cases: The case of every bag; by default every bag is its own.
        val_fraction: Share of the members that goes to validation.
        seed: Seed of the draw.

    Returns:
        Indices of the bags that stay in training, and of those drawn, both sorted.

    Raises:
        ValueError: If ``val_fraction`` is out of range.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"val_fraction must lie between 0 and 1, but {val_fraction} came. Use 0.2, say."
        )
    count = Counter(labels[index] for index in members)
    members_of: dict[str, list[int]] = {}
    for index in members:
        members_of.setdefault(str(index) if cases is None else cases[index], []).append(index)
    strata: dict[int, list[list[int]]] = {}
    for group in members_of.values():
        rarest = min((labels[index] for index in group), key=lambda label: (count[label], label))
        strata.setdefault(rarest, []).append(group)
    sizes = {label: len(strata[label]) for label in sorted(strata)}
    if cases is None:
        quota = {label: round(val_fraction * size) for label, size in sizes.items()}
    else:
        quota = _apportion(sizes, val_fraction)

    # Drawn per class: scikit-learn's stratified draw may leave a small class without a bag.
    generator = random.Random(seed)
    draws: list[list[int]] = []
    for _ in range(_N_DRAWS):
        drawn: list[int] = []
        for label in sizes:
            groups = list(strata[label])
            generator.shuffle(groups)
            drawn += [index for group in groups[: quota[label]] for index in group]
        draws.append(drawn)

    def distance(drawn: list[int]) -> tuple[int, float]:
        inside = Counter(labels[index] for index in drawn)
        n_absent = sum(inside[label] in (0, count[label]) for label in count)
        return n_absent, sum(abs(inside[label] / count[label] - val_fraction) for label in count)

    closest = min(draws, key=distance)
    val = set(closest)
    return sorted(set(members) - val), sorted(val)


def split_by_parts(table: LabelTable, *, val_fraction: float, seed: int) -> Split:
    """The split that a table's parts say.

    Args:
        table: The table. A slide without a part is left out, with a warning. If no slide is meant
            for validation, that part is drawn from training by `draw_validation`.
        val_fraction: Share of the training slides that is drawn for validation.
        seed: Seed of that draw.

    Returns:
        The split, its indices sorted.

    Raises:
        ValueError: If no slide is meant for training, and as `check_split`.

    Example:
        >>> table = LabelTable(
        ...     slide_ids=["a", "b", "c", "d", "e"],
        ...     labels=[0, 1, 0, 1, 0],
        ...     classes=["normal", "tumor"],
        ...     cases=["p", "q", "r", "s", "t"],
        ...     parts=["train", "train", "train", "train", "test"],
        ... )
        >>> split = split_by_parts(table, val_fraction=0.5, seed=0)
        >>> len(split.train), len(split.val), split.test
        (2, 2, [4])
    """
    members = {
        part: [index for index, own in enumerate(table.parts) if own == part] for part in PARTS
    }
    if not members["train"]:
        raise ValueError(
            "A split needs slides for training, but the parts are "
            f"{dict(Counter(table.parts))}. Give every slide its part: train, val or test."
        )
    left_out = [
        name for name, part in zip(table.slide_ids, table.parts, strict=True) if part is None
    ]
    if left_out:
        rank_zero_warn(
            f"The split leaves out {len(left_out)} of {len(table.slide_ids)} slides of the label "
            f"table: {left_out[:5]}."
        )
    split = Split(**members)
    if not split.val:
        # A case of the test part must be refused here, and not be drawn for validation.
        _check_leakage(split, table)
        train, val = draw_validation(
            table.labels, split.train, cases=table.cases, val_fraction=val_fraction, seed=seed
        )
        split = Split(train=train, val=val, test=split.test)
    check_split(split, table)
    return split


def check_split(split: Split, table: LabelTable) -> None:
    """Refuse a split that would give wrong figures.

    The test part may lack a class or be empty: metrics average over the classes that are there.

    Args:
        split: The split.
        table: The slides that its indices count.

    Raises:
        ValueError: If an index is out of range or comes twice, a case is in two parts, or a class
            that is in the split is missing in training or validation.
    """
    n_slides = len(table.slide_ids)
    parts_of: dict[int, list[str]] = {}
    for part, indices in split.parts.items():
        for index in indices:
            if not 0 <= index < n_slides:
                raise ValueError(
                    f"A split must hold indices in 0..{n_slides - 1}, but {index} is in part "
                    f"{part!r}. Make it of this label table."
                )
            parts_of.setdefault(index, []).append(part)
    twice = {table.slide_ids[index]: found for index, found in parts_of.items() if len(found) > 1}
    if twice:
        raise ValueError(
            f"A slide must come once in a split, but {len(twice)} come more often: "
            f"{_listed(twice)}. Keep every slide in one part."
        )
    _check_leakage(split, table)
    _check_every_class(table.labels, split, names=table.classes)


def _check_folds(
    labels: Sequence[int],
    cases: Sequence[str] | None,
    *,
    names: Sequence[str],
    n_folds: int,
    fold: int,
) -> None:
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, but {n_folds} came. Use 5 or 10.")
    if not 0 <= fold < n_folds:
        raise ValueError(
            f"fold must lie in 0..{n_folds - 1}, but {fold} came. Folds are counted from 0."
        )
    if cases is not None and len(cases) != len(labels):
        raise ValueError(
            f"Every bag must have a case, but {len(cases)} cases came for {len(labels)} bags. "
            "Give both in one order."
        )
    units = range(len(labels)) if cases is None else cases
    count = Counter(label for label, _ in set(zip(labels, units, strict=True)))
    smallest = min(sorted(count), key=lambda label: count[label])
    if n_folds > count[smallest]:
        raise ValueError(
            f"Every fold needs a bag of every class, but class {names[smallest]} has "
            f"{count[smallest]} {'bags' if cases is None else 'cases'} for {n_folds} folds. "
            "Use fewer folds."
        )


def _apportion(sizes: Mapping[int, int], fraction: float) -> dict[int, int]:
    # Whole numbers with the right total (largest remainders), so that 60 cases at 0.1 give 6.
    quota = {label: min(size - 1, max(1, int(fraction * size))) for label, size in sizes.items()}
    n_missing = round(fraction * sum(sizes.values())) - sum(quota.values())
    by_remainder = sorted(sizes, key=lambda label: quota[label] - fraction * sizes[label])
    for label in by_remainder[: max(0, n_missing)]:
        quota[label] = min(sizes[label] - 1, quota[label] + 1)
    return quota


def _check_leakage(split: Split, table: LabelTable) -> None:
    parts_of: dict[str, list[str]] = {}
    for part, indices in split.parts.items():
        for case in dict.fromkeys(table.cases[index] for index in indices):
            parts_of.setdefault(case, []).append(part)
    leaked = {case: found for case, found in parts_of.items() if len(found) > 1}
    if leaked:
        raise ValueError(
            f"A case must be in one part of a split, but {len(leaked)} cases are in several: "
            f"{_listed(leaked)}. Move all slides of a case to one part."
        )


def _check_every_class(labels: Sequence[int], split: Split, *, names: Sequence[str]) -> None:
    present = {labels[index] for indices in split.parts.values() for index in indices}
    for part in ("train", "val"):
        missing = present - {labels[index] for index in split.parts[part]}
        if missing:
            raise ValueError(
                f"Training and validation need a bag of every class, but part {part!r} has none "
                f"of class {names[min(missing)]}. Change val_fraction, the seed or the number of "
                "folds, or add bags of that class."
            )


def _listed(parts_of: Mapping[str, Sequence[str]]) -> str:
    shown = [f"{name!r} in {' and '.join(parts)}" for name, parts in list(parts_of.items())[:5]]
    return ", ".join(shown) + (", ..." if len(parts_of) > 5 else "")
