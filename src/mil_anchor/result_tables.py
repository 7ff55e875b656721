"""The tables of a report: what runs reached, what a plug-in changes, what is missing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mil_anchor.comparison import (
    SLIDE_TESTS,
    Comparison,
    Pair,
    PredictionReader,
    compare,
    on_one_machine,
    pair_runs,
    ratio_to_base,
)
from mil_anchor.missing import missing_runs
from mil_anchor.reproduction import reproduction_table
from mil_anchor.results import CellKey, Progress, Run, Unfinished, by_cell
from mil_anchor.tables import Cell, Column, ResultTable, mean_cell, number_cell

_NAMES = [Column(title, is_number=False) for title in ("data", "model", "plug-in")]
# The pairs of each cell that has one.
_Pairs = Mapping[CellKey, Sequence[Pair]]
_METRICS = {"f1": "F1", "auroc": "AUROC", "accuracy": "accuracy"}
_PARTS = {"test": "test bags", "val": "validation bags"}


class _Measure(NamedTuple):
    key: str
    title: str
    digits: int = 3
    factor: float = 1


def all_tables(
    runs: Sequence[Run], unfinished: Sequence[Unfinished], *, progress: Progress = iter
) -> list[ResultTable]:
    """All tables of a report; one that the runs have no numbers for has no rows.

    The metrics are those of the test bags or, where no run has measured any, of validation.

    Args:
        runs: Complete runs.
        unfinished: Run folders without a result.
        progress: Called with the cells to be compared; gives them one by one.

    Returns:
        ``results``, ``differences`` (to the same runs without a plug-in), ``tests`` (more of them),
        ``stability``, ``concentration``, ``localization``, ``cost``, ``flops``, ``calibration``,
        ``reproduction``, ``unfinished`` and ``missing``.
    """
    part = "test" if any("test/f1" in run.metrics for run in runs) else "val"
    reader = PredictionReader(part)
    pairs = pair_runs(runs)
    found = compare(pairs, [*_METRICS, "calibration_error"], reader=reader, progress=progress)
    return [
        _results(runs, part),
        _differences([one for one in found if one.metric in _METRICS], part),
        _tests([one for one in found if one.metric in _METRICS]),
        _stability(runs, pairs),
        _concentration(runs),
        _localization(runs),
        _cost(runs, pairs),
        _flops(runs, pairs),
        _calibration(runs, [one for one in found if one.metric not in _METRICS], reader),
        reproduction_table(runs),
        _unfinished(unfinished),
        _missing(runs, unfinished),
    ]


def _results(runs: Sequence[Run], part: str) -> ResultTable:
    measures = [_Measure(f"{part}/{key}", title) for key, title in _METRICS.items()]
    columns = [*_columns(measures), Column("weights", is_number=False)]
    rows = [
        [*_head(cell, members), *_means(members, measures), Cell(_weights(members))]
        for cell, members in by_cell(runs).items()
    ]
    note = (
        "Mean±sd over n runs (seeds, folds) of the checkpoint that validation chose; weights: "
        "which ones were evaluated, those that are trained (online) or averages of them."
    )
    return ResultTable("results", f"Results on {_PARTS[part]}", columns, rows, note)


def _differences(found: Sequence[Comparison], part: str) -> ResultTable:
    titles = ("n", "difference", "low", "high", "p", "Holm p")
    rows = [
        [
            *_names(one),
            Cell(str(len(one.differences)), len(one.differences)),
            *_changes(one),
            _p_cell(one.holm_p),
        ]
        for one in found
    ]
    note = (
        "With the plug-in minus without, mean over n pairs of runs that are equal in all else "
        "(seed, fold, settings), and its 95 % interval (Student's t), which is too short where "
        "pairs share training slides, as folds do. p: all flips of the signs of the n differences, "
        "so that n = 5 cannot go below .062. Holm p: corrected for the data sets of a model, "
        "plug-in and metric."
    )
    title = f"Differences to plugin=none on {_PARTS[part]}"
    return ResultTable("differences", title, _metric_columns(titles), rows, note)


def _tests(found: Sequence[Comparison]) -> ResultTable:
    titles = ("effect", "low", "high", "Wilcoxon p", "slides p", "left out")
    rows = [
        [
            *_names(one),
            *(
                number_cell(value, digits=2, sign="+")
                for value in (one.test.effect, *one.test.effect_interval)
            ),
            _p_cell(one.test.wilcoxon_p if len(one.differences) > 1 else None),
            _p_cell(one.slides_p),
            number_cell(one.n_left_out if one.metric in SLIDE_TESTS else None, digits=0),
        ]
        for one in found
    ]
    note = (
        "effect: mean of the paired differences in units of their sd (Hedges' g), and its 95 % "
        "interval. Wilcoxon p: signed ranks of the pairs. slides p: DeLong's test (AUROC) or "
        "permutations (F1) over the slides of each pair, combined over the pairs, whose slides "
        "never count as further cases; left out: pairs that have none, for want of predictions, of "
        "slides of a class, or of a variance."
    )
    title = "More tests of the differences"
    return ResultTable("tests", title, _metric_columns(titles), rows, note)


def _stability(runs: Sequence[Run], pairs: _Pairs) -> ResultTable:
    measures = (
        _Measure("attention/jsd_first_two_thirds", "early", 3, 1000),
        _Measure("attention/jsd_last_third", "late", 3, 1000),
    )
    note = (
        "Jensen-Shannon divergence of a validation bag's attention between epochs, nats x 1000, in "
        "the first two thirds of the epochs (early) and in the last third, where a cosine schedule "
        "alone brings it down; ratio: geometric mean over pairs with plugin=none. Uniform "
        "attention is perfectly stable: read it beside the entropy and the results."
    )
    title = "JSD of attention between epochs, x 1000"
    return _measured("stability", title, runs, measures, note=note, compared=pairs)


def _concentration(runs: Sequence[Run]) -> ResultTable:
    measures = (
        _Measure("attention/rank_correlation", "rank corr."),
        _Measure("attention/entropy", "entropy"),
        _Measure("attention/top1pct", "top 1 %"),
        _Measure("attention/top10", "top 10"),
    )
    note = (
        "Of validation bags: rank correlation with the epoch before, entropy / ln N (1: uniform), "
        "and the attention that the highest 1 % and the 10 highest instances have."
    )
    return _measured("concentration", "Attention in the last epoch", runs, measures, note=note)


def _localization(runs: Sequence[Run]) -> ResultTable:
    measures = (
        _Measure("localization/auroc", "AUROC"),
        _Measure("localization/average_precision", "AP"),
        _Measure("localization/dice", "Dice"),
        _Measure("localization/specificity", "specificity"),
        _Measure("localization/froc", "FROC"),
    )
    note = "How well the attention of test slides finds the tiles or lesions that are annotated."
    return _measured("localization", "Localisation of lesions", runs, measures, note=note)


def _cost(runs: Sequence[Run], pairs: _Pairs) -> ResultTable:
    measures = (
        _Measure("time/epoch_s", "s/epoch", 2),
        _Measure("cost/peak_memory_mb", "MB", 1),
    )
    note = (
        "Seconds of an epoch with its validation and monitoring, and peak memory of a training "
        "step (on a CPU, of its tensors alone); ratio: geometric mean over pairs with plugin=none "
        "that ran on one kind of machine. Runs side by side slow each other down."
    )
    compared = {cell: on_one_machine(own) for cell, own in pairs.items()}
    return _measured("cost", "Time and memory", runs, measures, note=note, compared=compared)


def _flops(runs: Sequence[Run], pairs: _Pairs) -> ResultTable:
    measures = (
        _Measure("cost/flops_step", "training step", 1, 1e-6),
        _Measure("cost/flops_inference", "inference", 1, 1e-6),
    )
    note = (
        "Matrix products that torch's counter sees, of one bag: a training step has forward, "
        "backward and plug-in; ratio: geometric mean over pairs with plugin=none."
    )
    return _measured("flops", "Matmul MFLOPs", runs, measures, note=note, compared=pairs)


def _calibration(
    runs: Sequence[Run], found: Sequence[Comparison], reader: PredictionReader
) -> ResultTable:
    loss = _Measure(f"{reader.part}/loss", "log loss")
    compared = {(one.data, one.model, one.plugin): one for one in found}
    rows = []
    for cell, members in by_cell(runs).items():
        errors = [
            error
            for run in members
            if (error := reader.metric(run, "calibration_error")) is not None
        ]
        if errors:
            mean = _counted(mean_cell(errors), len(errors), len(members))
            measured = [mean, *_means(members, [loss])]
            rows.append([*_head(cell, members), *measured, *_changes(compared.get(cell))])
    columns = [
        *_columns([_Measure("", "ECE"), loss]),
        *(Column(title, is_number=True) for title in ("difference", "low", "high", "p")),
    ]
    note = (
        "Expected calibration error (15 bins), which few slides bias upwards, and cross-entropy; "
        "difference of the ECE to plugin=none, with interval and p as for the other metrics."
    )
    title = f"Calibration on {_PARTS[reader.part]}"
    return ResultTable("calibration", title, columns, rows, note)


def _unfinished(unfinished: Sequence[Unfinished]) -> ResultTable:
    titles = ("data", "model", "plug-in", "seed", "fold", "why", "folder")
    columns = [Column(title, is_number=title in ("seed", "fold")) for title in titles]
    rows = [
        [
            *(Cell(name) for name in (one.data, one.model, one.plugin)),
            *(Cell("?" if n is None else str(n), n) for n in (one.seed, one.fold)),
            Cell(one.reason),
            Cell(str(one.folder)),
        ]
        for one in unfinished
    ]
    return ResultTable("unfinished", "Runs without a result", columns, rows)


def _missing(runs: Sequence[Run], unfinished: Sequence[Unfinished]) -> ResultTable:
    cells: dict[CellKey, list[str]] = {}
    for one in missing_runs(runs, unfinished=unfinished):
        key = one.data, one.model, one.plugin
        cells.setdefault(key, []).append(f"{one.seed}/{one.fold}")
    columns = [*_NAMES, Column("n", is_number=True), Column("seed/fold", is_number=False)]
    rows = [
        [*map(Cell, cell), Cell(str(len(own)), len(own)), Cell(", ".join(own))]
        for cell, own in cells.items()
    ]
    note = "Seeds and folds that other runs of the data set have."
    return ResultTable("missing", "Runs that were never begun", columns, rows, note)


def _measured(
    name: str,
    title: str,
    runs: Sequence[Run],
    measures: Sequence[_Measure],
    *,
    note: str,
    compared: _Pairs | None = None,
) -> ResultTable:
    """Means of each cell that has one of the measures, and their ratios to the compared pairs."""
    shown = [own for own in measures if any(own.key in run.metrics for run in runs)]
    columns = _columns([])
    for measure in shown:
        columns.append(Column(measure.title, is_number=True))
        if compared is not None:
            columns.append(Column(f"{measure.title} ratio", is_number=True))
    rows = []
    for cell, members in by_cell(runs).items():
        if any(own.key in run.metrics for own in shown for run in members):
            row = _head(cell, members)
            for measure in shown:
                row += _means(members, [measure])
                if compared is not None:
                    ratio = ratio_to_base(compared.get(cell, []), measure.key)
                    row.append(number_cell(ratio, digits=2))
            rows.append(row)
    return ResultTable(name, title, columns, rows, note)


def _columns(measures: Iterable[_Measure]) -> list[Column]:
    titles = ["n", *(measure.title for measure in measures)]
    return [*_NAMES, *(Column(title, is_number=True) for title in titles)]


def _metric_columns(titles: Iterable[str]) -> list[Column]:
    numbers = [Column(title, is_number=True) for title in titles]
    return [*_NAMES, Column("metric", is_number=False), *numbers]


def _head(cell: CellKey, members: Sequence[Run]) -> list[Cell]:
    return [*map(Cell, cell), Cell(str(len(members)), len(members))]


def _names(one: Comparison) -> list[Cell]:
    return [Cell(text) for text in (one.data, one.model, one.plugin, _METRICS[one.metric])]


def _weights(runs: Sequence[Run]) -> str:
    return ", ".join(sorted({run.metrics.get("weights", "unknown") for run in runs}))


def _means(runs: Sequence[Run], measures: Iterable[_Measure]) -> list[Cell]:
    return [_mean(runs, own) for own in measures]


def _mean(runs: Sequence[Run], measure: _Measure) -> Cell:
    """Mean and sd; where runs lack the measure, of how many others."""
    values = [
        run.metrics[measure.key] * measure.factor for run in runs if measure.key in run.metrics
    ]
    return _counted(mean_cell(values, measure.digits), len(values), len(runs))


def _counted(cell: Cell, n_values: int, n_runs: int) -> Cell:
    return cell._replace(text=f"{cell.text} (n={n_values})") if 0 < n_values < n_runs else cell


def _changes(one: Comparison | None) -> list[Cell]:
    """Difference, its interval, and its p-value."""
    if one is None:
        return [Cell("-")] * 4
    shown = (one.test.mean, *one.test.interval)
    return [*(number_cell(value, sign="+") for value in shown), _p_cell(one.sign_flip_p)]


def _p_cell(value: float | None) -> Cell:
    return Cell("<.001", value) if value is not None and value < 0.001 else number_cell(value)
