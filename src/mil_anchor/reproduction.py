"""The papers' numbers beside ours, where both measure the same."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mil_anchor.comparison import Pair, on_one_machine, pair_runs, ratio_to_base
from mil_anchor.environment import read_environment
from mil_anchor.published import Counterpart, Published, published
from mil_anchor.results import CellKey, Run, by_cell
from mil_anchor.tables import Cell, Column, ResultTable, mean_cell, number_cell


def reproduction_table(runs: Sequence[Run]) -> ResultTable:
    """The papers' numbers beside ours, and for each of ours why it is not comparable, if so.

    A number of ours stands beside a metric of the paper where data, model and plug-in are the
    same; it is comparable where the features and the protocol are, too. Ratios of costs stand
    beside the paper's for any data, and are comparable on the paper's data and GPU only.
    """
    titles = (
        "data",
        "method",
        "quantity",
        "paper",
        "ours",
        "n",
        "our runs",
        "comparable",
        "source",
    )
    numbers = ("paper", "ours", "n")
    columns = [Column(title, is_number=title in numbers) for title in titles]
    rows = [
        [
            *(Cell(text) for text in (one.data, one.method, one.quantity)),
            Cell(f"{one.value:g}", one.value),
            *ours,
            Cell(one.source),
        ]
        for one in published()
        for ours in _beside(one, runs)
    ]
    note = (
        "Recovered from the papers; the rest of their tables is lost, and so is the weight of the "
        "divergence. The released code counts F1 of ASMIL over all slides (accuracy) and that of "
        "the other models per class; ours is always the mean over classes."
    )
    return ResultTable("reproduction", "The papers' numbers beside ours", columns, rows, note)


class _Found(NamedTuple):
    """Runs of ours that correspond to a published number."""

    run: Run  # one of them
    value: Cell
    n_runs: int
    reasons: list[str]  # why not comparable


def _beside(one: Published, runs: Sequence[Run]) -> Iterator[list[Cell]]:
    """Our number, of how many runs, of which, and whether comparable; a line for each cell."""
    if isinstance(one.ours, str):
        yield _no_counterpart(one.ours)
        return
    of_model = [run for run in runs if (run.config or {}).get("model._target_") == one.ours.model]
    if one.ours.base is None:
        found = list(_values(one, one.ours, of_model))
    else:
        found = list(_ratios(one, one.ours, pair_runs(of_model, base=one.ours.base)))
    for own in found:
        judged = f"not comparable: {'; '.join(own.reasons)}" if own.reasons else "yes"
        n_runs = Cell(str(own.n_runs), own.n_runs)
        yield [own.value, n_runs, Cell(", ".join(own.run.cell)), Cell(judged)]
    if not found:
        yield _no_counterpart(f"no run of it on {one.data}")


def _no_counterpart(why: str) -> list[Cell]:
    return [Cell("-"), Cell("0", 0), Cell("-"), Cell(f"not comparable: {why}")]


def _values(one: Published, ours: Counterpart, runs: Sequence[Run]) -> Iterator[_Found]:
    """Means of a metric where the data is the paper's."""
    for members in by_cell(runs).values():
        first = members[0]
        known = [run for run in members if ours.key in run.metrics]
        if first.metrics["plugin"] == ours.plugin and _data_of(first) == one.data and known:
            reasons = _other_gpu(one, known) if one.gpu else _other_protocol(ours, members)
            value = mean_cell([run.metrics[ours.key] for run in known])
            yield _Found(first, value, len(known), reasons)


def _ratios(
    one: Published, ours: Counterpart, pairs: Mapping[CellKey, Sequence[Pair]]
) -> Iterator[_Found]:
    """Ratios of a cost to that of the base plug-in, on any data."""
    for members in pairs.values():
        kept = [pair for pair in on_one_machine(members) if pair.has(ours.key)]
        ratio = ratio_to_base(kept, ours.key)
        first = members[0].own
        if first.metrics["plugin"] == ours.plugin and ratio is not None:
            data = _data_of(first)
            elsewhere = [] if data == one.data else [f"on {data}, the paper's on {one.data}"]
            reasons = [*elsewhere, *_other_gpu(one, [pair.own for pair in kept])]
            yield _Found(first, number_cell(ratio, digits=2), len(kept), reasons)


def _data_of(run: Run) -> str:
    """What the data is, whatever the run calls it."""
    config = run.config or {}
    for key in ("data.cohort", "data.name"):
        if config.get(key, "null") != "null":
            return config[key]
    return str(run.metrics["data"])


def _other_gpu(one: Published, runs: Sequence[Run]) -> list[str]:
    if one.gpu is None:
        return []
    others = sorted({own for own in map(_machine, runs) if one.gpu not in own})
    return [f"on {', '.join(others)}, the paper's on {one.gpu}"] if others else []


def _machine(run: Run) -> str:
    hardware = read_environment(run.folder)
    return hardware.get("gpu") or hardware.get("processor") or "an unknown machine"


def _other_protocol(ours: Counterpart, runs: Sequence[Run]) -> list[str]:
    config = runs[0].config or {}
    reasons = [
        f"{key} {config.get(key, 'not set')}, the paper's {value:g}"
        for key, value in ours.settings.items()
        if _number(config.get(key)) != value
    ]
    width = runs[0].metrics.get("in_features")
    if ours.width is not None and width != ours.width:
        own = "of unknown width" if width is None else f"of width {width}"
        reasons.append(f"features {own}, the paper's of {ours.width}")
    n_folds = _number(config.get("data.n_folds")) or 1
    n_tested = len({run.draw[1] for run in runs})
    if ours.width is None and n_tested < n_folds:  # a set that comes with its features
        reasons.append(f"{n_tested} of {n_folds:g} folds")
    return reasons


def _number(text: str | None) -> float | None:
    """A number of a configuration; None where another thing or nothing is set."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
