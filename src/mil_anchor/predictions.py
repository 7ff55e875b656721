"""Writes and reads the ``predictions.csv`` of a run folder."""

import csv
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from mil_anchor.data.tables import read_rows, require_columns
from mil_anchor.module import Prediction

PREDICTIONS_FILE = "predictions.csv"


class Predictions(NamedTuple):
    """What a run predicted, a row for each bag.

    Args:
        bag_ids: Ids of the bags; each comes once in a part.
        labels: Their classes.
        parts: ``val`` or ``test``.
        probabilities: Probability of each class.
    """

    bag_ids: list[str]
    labels: Int[np.ndarray, " bag"]
    parts: list[str]
    probabilities: Float64[np.ndarray, "bag cls"]

    def of_part(self, part: str) -> "Predictions":
        """The rows of a part, sorted by bag id, so that those of two runs can be compared."""
        rows = sorted(
            (index for index, own in enumerate(self.parts) if own == part),
            key=lambda index: self.bag_ids[index],
        )
        return Predictions(
            [self.bag_ids[index] for index in rows],
            self.labels[rows],
            [part] * len(rows),
            self.probabilities[rows],
        )


def write_predictions(file: Path, rows: list[tuple[str, Prediction]]) -> None:
    """Write ``predictions.csv`` from the part and prediction of each bag."""
    n_classes = len(rows[0][1].probabilities)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["bag_id", "label", "split", *(f"prob_{c}" for c in range(n_classes))])
        writer.writerows([row.bag_id, row.label, part, *row.probabilities] for part, row in rows)


def read_tested(folder: Path) -> Predictions | None:
    """What a run has predicted of its test bags, sorted by id; None if there is nothing.

    Args:
        folder: Of the run.

    Raises:
        ValueError: As `read_predictions`.
    """
    file = folder / PREDICTIONS_FILE
    tested = read_predictions(file).of_part("test") if file.exists() else None
    return tested if tested is not None and tested.bag_ids else None


def read_predictions(file: Path) -> Predictions:
    """Read a ``predictions.csv``.

    Args:
        file: Its path.

    Returns:
        All rows in the order of the file: bags of the validation and of the test part.

    Raises:
        ValueError: It is no file, has no row, lacks a column, holds something else than numbers and
            probabilities, or names a bag twice in a part.
    """
    rows = read_rows(file)
    classes = [column for column in rows[0] if column.startswith("prob_")]
    expected = [f"prob_{index}" for index in range(max(2, len(classes)))]
    require_columns(rows, ["bag_id", "label", "split", *expected], source=file)
    try:
        labels = np.array([int(row["label"]) for row in rows], dtype=np.int64)
        probabilities = np.array([[float(row[name]) for name in expected] for row in rows])
    except ValueError as error:
        raise ValueError(
            f"Labels must be whole numbers and probabilities numbers, but {file} has others "
            f"({error}). Run the experiment again with resume=false."
        ) from error
    is_wrong = ~((probabilities >= 0) & (probabilities <= 1)).all(axis=1)
    is_wrong |= (labels < 0) | (labels >= len(expected))
    if is_wrong.any():
        raise ValueError(
            f"Probabilities must lie in [0, 1] and labels below their number, but {file} has "
            f"{rows[int(is_wrong.argmax())]}. Look for a diverged loss if they are NaN."
        )
    counts = Counter((row["split"], row["bag_id"]) for row in rows)
    repeated = [bag_id for (_, bag_id), count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"A bag must come once in a part, but {file} has {repeated} twice. Keep one run in a "
            "folder: the predictions of several runs are no further cases."
        )
    return Predictions(
        [row["bag_id"] for row in rows], labels, [row["split"] for row in rows], probabilities
    )
