"""Compares plug-ins with the same runs without one, pair by pair."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from mil_anchor.calibration import calibration
from mil_anchor.environment import read_environment
from mil_anchor.predictions import PREDICTIONS_FILE, Predictions, read_predictions
from mil_anchor.results import CellKey, Progress, Run, by_cell
from mil_anchor.run_folder import read_cases
from mil_anchor.settings import bearing
from mil_anchor.stats import (
    PairedTest,
    combine_p_values,
    delong_test,
    holm,
    paired_test,
    permutation_test,
)

log = logging.getLogger(__name__)

# Metrics that the slides of a pair are tested in.
SLIDE_TESTS = ("auroc", "f1")
# Metrics are float32: what two runs share differs by less in another order of sums.
_ROUNDING = 1e-6


class Pair(NamedTuple):
    """A run with a plug-in, and the one that differs from it in the plug-in alone."""

    own: Run
    base: Run

    def has(self, key: str) -> bool:
        """Whether both runs have measured this."""
        return key in self.own.metrics and key in self.base.metrics


class Comparison(NamedTuple):
    """What a plug-in changes in a metric, over the seeds and folds of a data set and model.

    Args:
        data: Data set.
        model: Model.
        plugin: Plug-in with its setting.
        metric: Key of ``metrics.json`` without its part, such as ``auroc``.
        differences: With the plug-in minus without, a number for each pair.
        test: Over the pairs; see `mil_anchor.stats.paired_test`.
        sign_flip_p: Of the test; NaN for a single pair, which can show nothing.
        holm_p: The same, corrected for the data sets of the model, plug-in and metric.
        slides_p: Over the slides of each pair (DeLong's test of the AUROC, permutations for F1),
            combined over the pairs; None for other metrics, and where no pair has one.
        n_left_out: Pairs that ``slides_p`` says nothing of: without predictions, with too few
            slides of a class, or without a variance.
    """

    data: str
    model: str
    plugin: str
    metric: str
    differences: list[float]
    test: PairedTest
    sign_flip_p: float
    holm_p: float
    slides_p: float | None
    n_left_out: int


class PredictionReader:
    """Reads what runs predicted on a part, each file once.

    Args:
        part: ``test`` or ``val``.
    """

    def __init__(self, part: str) -> None:
        self.part = part
        self._read: dict[Path, Predictions | None] = {}

    def predictions(self, run: Run) -> Predictions | None:
        """The run's predictions; None if there are none that can be read."""
        if run.folder not in self._read:
            self._read[run.folder] = self._predictions(run.folder / PREDICTIONS_FILE)
        return self._read[run.folder]

    def metric(self, run: Run, metric: str) -> float | None:
        """A metric of the part; ``calibration_error`` comes from the predictions."""
        if metric != "calibration_error":
            value = run.metrics.get(f"{self.part}/{metric}")
            return None if value is None else float(value)
        own = self.predictions(run)
        return None if own is None else calibration(own.labels, own.probabilities).error

    def is_of_same_slides(self, pair: Pair) -> bool:
        """Whether both runs have the same bags and labels, as far as their predictions tell."""
        own, base = self.predictions(pair.own), self.predictions(pair.base)
        if own is None or base is None:
            return True
        return own.bag_ids == base.bag_ids and bool(np.array_equal(own.labels, base.labels))

    def slides_p(self, pairs: Sequence[Pair], metric: str) -> tuple[float | None, int]:
        """The p-values of the pairs, each over its slides, combined, and how many pairs have none.

        None in place of a p-value if no pair has one.
        """
        p_values: list[float] = []
        tested: list[str] = []
        for pair in pairs:
            own, base = self.predictions(pair.own), self.predictions(pair.base)
            if own is None or base is None:
                continue
            cases = read_cases(pair.own.folder)
            p_value = _slides_p(own, base, metric, cases=cases)
            if p_value is not None and not math.isnan(p_value):
                p_values.append(p_value)
                # A patient may have slides in the test parts of several folds.
                tested += {cases.get(bag_id, bag_id) for bag_id in own.bag_ids}
        n_left_out = len(pairs) - len(p_values)
        if not p_values:
            return None, n_left_out
        is_independent = len(set(tested)) == len(tested)
        return combine_p_values(p_values, independent=is_independent), n_left_out

    def _predictions(self, file: Path) -> Predictions | None:
        try:
            own = read_predictions(file).of_part(self.part)
        except (OSError, ValueError):
            return None
        return own if own.bag_ids else None


def pair_runs(runs: Iterable[Run], *, base: str = "none") -> dict[CellKey, list[Pair]]:
    """Each plug-in's runs beside those of the base plug-in that are equal in all else.

    Equal are data, model, seed, fold and all of the configuration that bears on the result,
    besides the plug-in's own. Where several qualify, one of the same ``out``
    is taken.

    Args:
        runs: Those to be paired.
        base: Name of the plug-in that the others are compared with.

    Returns:
        The pairs of each cell that has one.
    """
    cells = by_cell(runs)
    known: dict[Any, list[Run]] = {}
    for run in (run for members in cells.values() for run in members):
        if run.metrics["plugin"] == base:
            known.setdefault(_without_plugin(run), []).append(run)
    pairs: dict[CellKey, list[Pair]] = {}
    for cell, members in cells.items():
        for run in members:
            partners = known.get(_without_plugin(run), [])
            if partners and run.metrics["plugin"] != base:
                nearest = min(partners, key=lambda partner: _out(partner) != _out(run))
                pairs.setdefault(cell, []).append(Pair(run, nearest))
    return pairs


def compare(
    pairs: Mapping[CellKey, Sequence[Pair]],
    metrics: Sequence[str] = ("f1", "auroc", "accuracy"),
    *,
    reader: PredictionReader,
    progress: Progress = iter,
) -> list[Comparison]:
    """Compare each plug-in with ``plugin=none`` on each data set and model.

    A pair (seed and fold) is a case, never a slide of it: seeds share their slides. Within a pair
    the slides are the cases; those p-values are combined in a way that allows for pairs that share
    slides, where they do. Two runs with predictions of other bags or labels are no pair.

    Args:
        pairs: Those of each cell, as `pair_runs` finds them.
        metrics: Keys of ``metrics.json`` without the part; ``calibration_error`` is measured here.
        reader: Of the part that is compared.
        progress: Called with the cells to be compared; gives them one by one.

    Returns:
        A comparison for each cell and metric that a pair has.

    Source:
        Holm (1979) over the data sets, within a model, plug-in and metric. The tests are those of
        `mil_anchor.stats`.
    """
    found = []
    for cell in progress(list(pairs)):
        data, model, plugin = cell
        members = [pair for pair in pairs[cell] if reader.is_of_same_slides(pair)]
        if len(members) < len(pairs[cell]):
            n_other = len(pairs[cell]) - len(members)
            log.warning("%s: %d pair(s) left out, of other bags than plugin=none", cell, n_other)
        for metric in metrics:
            values = [
                (own, base)
                for pair in members
                for own in [reader.metric(pair.own, metric)]
                for base in [reader.metric(pair.base, metric)]
                if own is not None and base is not None
            ]
            if values:
                differences = [own - base for own, base in values]
                test = paired_test(differences, rounding=_ROUNDING)
                slides_p, n_left_out = reader.slides_p(members, metric)
                p_value = test.sign_flip_p if len(differences) > 1 else math.nan
                found.append(
                    Comparison(
                        data,
                        model,
                        plugin,
                        metric,
                        differences,
                        test,
                        sign_flip_p=p_value,
                        holm_p=p_value,
                        slides_p=slides_p,
                        n_left_out=n_left_out,
                    )
                )
    return _corrected(found)


def ratio_to_base(pairs: Sequence[Pair], key: str) -> float | None:
    """Geometric mean of a metric's ratio to the base run; None where a pair has none above 0."""
    known = [(p.own.metrics[key], p.base.metrics[key]) for p in pairs if p.has(key)]
    if not known or min(min(values) for values in known) <= 0:
        return None
    return math.exp(fmean(math.log(own / base) for own, base in known))


def on_one_machine(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of which both runs say that they had the same processor, threads and GPU."""
    return [
        pair for pair in pairs if _hardware(pair.own) == _hardware(pair.base) != [None, None, None]
    ]


def _slides_p(
    own: Predictions, base: Predictions, metric: str, *, cases: Mapping[str, str]
) -> float | None:
    # The slides of a patient are no independent cases.
    groups = [cases.get(bag_id, bag_id) for bag_id in own.bag_ids]
    probabilities = own.probabilities, base.probabilities
    try:
        if metric == "auroc":
            return delong_test(own.labels, *probabilities, groups=groups).p_value
        if metric == "f1":
            chosen = [rows.argmax(axis=1) for rows in probabilities]
            return permutation_test(own.labels, *chosen, groups=groups).p_value
    except ValueError:  # too few slides of a class
        return None
    return None


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction over the data sets."""
    families: dict[tuple[str, ...], list[int]] = {}
    for index, one in enumerate(found):
        families.setdefault((one.model, one.plugin, one.metric), []).append(index)
    corrected = list(found)
    for members in families.values():
        p_values = holm([found[index].sign_flip_p for index in members])
        for index, p_value in zip(members, p_values, strict=True):
            corrected[index] = found[index]._replace(holm_p=p_value)
    return corrected


def _without_plugin(run: Run) -> Any:
    config = bearing(run.config or {}).items()
    rest = {(key, own) for key, own in config if key != "site" and not key.startswith("plugin.")}
    return *run.cell[:2], run.draw, frozenset(rest)


def _out(run: Run) -> str | None:
    return (run.config or {}).get("out")


def _hardware(run: Run) -> list[Any]:
    environment = read_environment(run.folder)
    return [environment.get(key) for key in ("processor", "n_threads", "gpu")]
