"""The page: what it holds, put into its template."""

import base64
import json
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from hashlib import sha256
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from mil_anchor.figures.style import COLORS, line_styles
from mil_anchor.missing import missing_runs
from mil_anchor.report.curves import (
    ATTENTION,
    LEARNING,
    attention_curves,
    learning_curves,
    reliability,
)
from mil_anchor.report.runs import runs_html
from mil_anchor.report.slides import color_stops, slides
from mil_anchor.report.tables import table_html
from mil_anchor.results import Run, Unfinished, by_cell
from mil_anchor.tables import ResultTable

try:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The report's page needs plotly, which is not installed. "
        "Run: pip install 'mil_anchor[report]'"
    ) from error

log = logging.getLogger(__name__)

# The same hues on a dark page: black would vanish there, and so nearly would the blue.
_DARK_COLORS = ("#F2F2F2", "#3B9BE0", "#EE7A33", "#1FBF91", "#D98FB9", "#8CCBF0", "#F0B429")
_SCRIPTS = ("page.js", "charts.js", "slides.js")
# Of a dozen tables, so that the curves are not far below.
_N_OPEN = 2
_CHOICES = {"data": "data set", "model": "model", "plugin": "plug-in"}

_Value = TypeVar("_Value")


def write_report(
    file: Path,
    runs: Sequence[Run],
    *,
    unfinished: Sequence[Unfinished] = (),
    tables: Sequence[ResultTable],
) -> None:
    """Write runs as one HTML page that opens from disk and asks no network for anything.

    It holds the tables, which sort and filter; the attention, the learning and the calibration of
    every run as curves; heat maps of a few slides, the plug-ins side by side, with a slider over
    the epochs; and the configuration and environment of every run. What a run has not kept, or what
    cannot be read, is left out.

    Args:
        file: The page to write, in one piece; its folder must exist.
        runs: Complete runs, at least one.
        unfinished: Runs without a result.
        tables: As `mil_anchor.tables` has them; those with a column ``data``, ``model`` or
            ``plug-in`` are filtered by it.

    Raises:
        ValueError: There is no complete run.
    """
    if not runs:
        raise ValueError(
            "A report needs at least one complete run, but none came. Train one first."
        )
    ordered = [run for members in by_cell(runs).values() for run in members]
    partial = file.with_suffix(".partial")
    # Names of files may hold bytes that are no text.
    partial.write_bytes(_page(ordered, unfinished, tables).encode(errors="replace"))
    partial.replace(file)


def _page(
    runs: Sequence[Run], unfinished: Sequence[Unfinished], tables: Sequence[ResultTable]
) -> str:
    scripts = [get_plotlyjs(), *map(_packaged, _SCRIPTS)]
    return Template(_packaged("page.html")).substitute(
        allowed=" ".join(map(_hash, scripts)),
        style=_packaged("page.css"),
        counts=_counts(runs, unfinished),
        facts=_facts(runs),
        choices="".join(_choice(runs, place) for place in range(len(_CHOICES))),
        tables="".join(
            table_html(table, is_open=place < _N_OPEN) for place, table in enumerate(tables)
        ),
        runs=runs_html(runs, unfinished),
        data=_json(_data(runs)),
        scripts="".join(f"<script>{script}</script>\n" for script in scripts),
    )


def _packaged(name: str) -> str:
    return files("mil_anchor.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """By which the page names the scripts that a browser may run: no other one does."""
    return f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'"


def _json(data: Any) -> str:
    """JSON that no name within it can end before its time."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _counts(runs: Sequence[Run], unfinished: Sequence[Unfinished]) -> str:
    counts = {
        "complete": len(runs),
        "unfinished": len(unfinished),
        "missing": len(missing_runs(runs, unfinished=unfinished)),
    }
    return "".join(
        f'<li class="{name}{"" if n else " zero"}"><b>{n}</b> {name}</li>'
        for name, n in counts.items()
    )


def _facts(runs: Sequence[Run]) -> str:
    made = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    facts = {
        f"{title}s": ", ".join(_names(runs, place)) for place, title in enumerate(_CHOICES.values())
    }
    facts["made"] = f"{made}, by mil_anchor {version('mil_anchor')}"
    return "".join(
        f"<div><dt>{title}</dt><dd>{escape(fact)}</dd></div>" for title, fact in facts.items()
    )


def _choice(runs: Sequence[Run], place: int) -> str:
    """A drop-down of the data sets, models or plug-ins."""
    key, title = list(_CHOICES.items())[place]
    options = "".join(f"<option>{escape(name)}</option>" for name in _names(runs, place))
    return (
        f'<label>{title} <select name="{key}" data-choice="{key}">'
        f'<option value="">all</option>{options}</select></label>'
    )


def _names(runs: Sequence[Run], place: int) -> list[str]:
    """Data sets, models or plug-ins in the order of all figures: ``none`` stands first."""
    return sorted(
        {run.cell[place] for run in runs}, key=lambda name: (place == 2 and name != "none", name)
    )


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the scripts draw of."""
    styles = line_styles(_names(runs, 2))
    drawn = slides(runs)
    return {
        "colors": {"light": COLORS, "dark": _DARK_COLORS},
        "plugins": {
            name: {"color": COLORS.index(style.color), "dash": style.linestyle}
            for name, style in styles.items()
        },
        "measures": {
            "attention": [measure._asdict() for measure in ATTENTION],
            "learning": [measure._asdict() for measure in LEARNING],
        },
        "runs": [
            {
                **dict(zip(_CHOICES, run.cell, strict=True)),
                "draw": "seed {}, fold {}".format(*run.draw),
                "attention": _read(attention_curves, run),
                "learning": _read(learning_curves, run),
                "reliability": _read(reliability, run),
            }
            for run in runs
        ],
        "stops": color_stops(),
        "slides": drawn.shown,
        "slidesLeftOut": drawn.n_left_out,
    }


def _read(reader: Callable[[Run], _Value], run: Run) -> _Value | None:
    """What a run has kept; a file that is none must not cost the report of all others."""
    try:
        return reader(run)
    except ValueError as error:
        log.warning("The page lacks something of %s: %s", run.folder, error)
        return None
