"""Which runs a comparison lacks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mil_anchor.results import (
    CellKey,
    Run,
    Unfinished,
    by_cell,
    cell_key,
    keys_by_names,
    setting_of,
)


class Missing(NamedTuple):
    """A run that a comparison lacks: others of the same data have its seed and fold."""

    data: str
    model: str
    plugin: str
    seed: int
    fold: int


def missing_runs(runs: Sequence[Run], *, unfinished: Sequence[Unfinished] = ()) -> list[Missing]:
    """Which runs a table of all models, plug-ins, seeds and folds of a data set lacks.

    A cell lacks the seeds and folds that others of its data have; a model and plug-in without any
    run on the data lack all of them. What was begun is unfinished, not missing.
    """
    keys = keys_by_names(runs)
    begun = {(*_cell_of(one, keys), one.seed, one.fold) for one in unfinished}
    missing = []
    cells = by_cell(runs)
    for data in dict.fromkeys(cell[0] for cell in cells):
        of_data = [run for run in runs if run.cell[0] == data]
        there = {(run.metrics["model"], run.metrics["plugin"]) for run in of_data}
        known = {cell[1:]: {run.draw for run in cells[cell]} for cell in cells if cell[0] == data}
        for model in sorted({model for model, _ in there}):
            for plugin in sorted({plugin for _, plugin in there}):
                if (model, plugin) not in there:
                    known[model, plugin] = set()
        draws = sorted({run.draw for run in of_data})
        for (model, plugin), own in known.items():
            missing += [Missing(data, model, plugin, *draw) for draw in draws if draw not in own]
    return [one for one in missing if one not in begun]


def _cell_of(one: Unfinished, keys: Mapping[CellKey, Sequence[str]]) -> CellKey:
    """The cell that the run would be in, as far as its configuration tells."""
    names = one.data, one.model, one.plugin
    setting = "" if one.config is None else setting_of(one.config, keys.get(names))
    return cell_key(*names, setting)
