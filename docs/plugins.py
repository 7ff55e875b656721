"""Measures the runs behind plugins.md, and writes its tables.

`python -m docs.plugins ROOT` reads the complete runs below ROOT/table, ROOT/seeds, ROOT/choice and
ROOT/scope, which the commands on the page make, and writes plugins.json; without ROOT, the page
alone is written anew from plugins.json.
"""

import argparse
import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from rich.progress import track
from scipy.stats import t as student

from docs.pages import fill, table_row, table_rule
from mil_anchor.results import Run, read_runs

PAGE = Path(__file__).parent / "plugins.md"
PAGES = (PAGE, Path(__file__).parents[1] / "README.md")
MEASURED = PAGE.with_suffix(".json")
SCOPE_COST = Path(__file__).parents[1] / "benchmarks" / "scope.json"
SETS = ("table", "seeds", "choice", "scope")

Row = dict[str, Any]

# Settings of a plug-in that the runs vary, and what they are where the plug-in has no such key.
_SETTINGS = {
    "weight": None,
    "decay": None,
    "warmup": False,
    "schedule": "constant",
    "scope": "block",
}
_METRICS = {
    "f1": "test/f1",
    "auroc": "test/auroc",
    "val_f1": "val/f1",
    "val_auroc": "val/auroc",
    "val_loss": "val/loss",
    "tile_auroc": "localization/auroc",
    "tile_ap": "localization/average_precision",
    "fit_s": "time/fit_s",
}


class Column(NamedTuple):
    """A column of a table: its title, what it shows, digits and factor."""

    title: str
    key: str
    digits: int
    factor: float = 1


MAIN = (
    Column("F1", "f1", 2),
    Column("AUROC", "auroc", 2),
    Column("JSD·1000, early", "jsd_early", 2, 1000),
    Column("late", "jsd", 2, 1000),
    Column("entropy", "entropy", 2),
    Column("tile AUROC", "tile_auroc", 2),
)


# What `_against` gives.
_DIFFERENCES = ("ΔF1", "ΔAUROC", "Δtile AUROC", "JSD, early", "JSD, late")

SHOWN = {
    "slow": "evaluating with slow weights, no term in the loss",
    "anchor": "an anchor with a softmax",
    "anchor_nsf": "the paper's anchor with NSF",
}


def measure_run(run: Run, kind: str) -> Row:
    """One row of plugins.json."""
    config = OmegaConf.load(run.folder / "config.yaml")
    plugin = config.plugin
    settings = {
        key: OmegaConf.to_container(plugin[key]) if OmegaConf.is_config(plugin.get(key)) else value
        for key, default in _SETTINGS.items()
        for value in [plugin.get(key, default)]
    }
    names = {key: run.metrics[key] for key in ("data", "model", "plugin", "seed", "fold")}
    metrics = {key: run.metrics[name] for key, name in _METRICS.items() if name in run.metrics}
    measured = {**metrics, **_attention(run.folder)}
    # Four digits are more than the tables show.
    short = {key: float(f"{value:.4g}") for key, value in measured.items()}
    return {"set": kind, **names, **settings, **short}


def _attention(folder: Path) -> Row:
    """JSD over the first two thirds and the last third of the epochs; entropy in the last one."""
    with (folder / "attention.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    n_epochs = 1 + max(int(row["epoch"]) for row in rows)
    moved = [(int(row["epoch"]), float(row["jsd"])) for row in rows if row["jsd"]]
    early, late = (
        fmean(jsd for epoch, jsd in moved if (epoch >= n_epochs * 2 / 3) == is_late)
        for is_late in (False, True)
    )
    last = [row for row in rows if int(row["epoch"]) == n_epochs - 1]
    return {
        "jsd_early": early,
        "jsd": late,
        "entropy": fmean(float(row["entropy"]) for row in last),
    }


def paired(rows: Iterable[Row], base: Iterable[Row], key: str) -> list[float]:
    """Differences to the runs of the same model, data, seed and fold."""
    known = {_pair(row): row[key] for row in base if key in row}
    return [row[key] - known[_pair(row)] for row in rows if key in row and _pair(row) in known]


def _pair(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("data", "model", "seed", "fold"))


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of Student's t around it."""
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = student.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half


def by_slides(
    differences: Callable[[Sequence[Row]], list[float]], rows: Sequence[Row]
) -> list[float]:
    """One mean for each data set and seed: models that share slides are no cases of their own."""
    clusters: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        clusters.setdefault((row["data"], row["seed"]), []).append(row)
    means = [differences(cluster) for cluster in clusters.values()]
    return [fmean(values) for values in means if values]


def each(measured: Row) -> str:
    """Every model, plug-in and data set."""
    rows = _of(measured, "table")
    lines = []
    for data in _values(rows, "data"):
        of_data = [row for row in rows if row["data"] == data]
        n_seeds = len(_values(of_data, "seed"))
        columns = [column for column in MAIN if any(column.key in row for row in of_data)]
        lines += [
            f"`{data}`, mean±sd over {n_seeds} seeds; differences to `none`, paired by seed, with "
            "their 95 % interval:"
        ]
        titles = ["model", "plug-in", *(c.title for c in columns), "ΔF1", "ΔAUROC"]
        lines += ["", table_row(*titles), table_rule(2, len(titles) - 2)]
        for model in _values(of_data, "model"):
            of_model = [row for row in of_data if row["model"] == model]
            base = [row for row in of_model if row["plugin"] == "none"]
            for plugin in _values(of_model, "plugin"):
                own = [row for row in of_model if row["plugin"] == plugin]
                differences = (
                    "" if plugin == "none" else _interval(paired(own, base, key))
                    for key in ("f1", "auroc")
                )
                lines.append(
                    table_row(
                        model, f"`{plugin}`", *(_mean_sd(own, c) for c in columns), *differences
                    )
                )
        lines.append("")
    return "\n".join(lines[:-1])


def summary(measured: Row) -> str:
    """What the plug-ins that a user meets first do, in one sentence each."""
    rows = _of(measured, "table")
    base = [row for row in rows if row["plugin"] == "none"]
    n_models, n_seeds = len(_values(rows, "model")), len(_values(rows, "seed"))
    lines = [
        f"Over {n_models} models, {len(_values(rows, 'data'))} small data sets and {n_seeds} seeds "
        f"({len(rows)} runs), against the same run without a plug-in:",
        "",
    ]
    for plugin, words in SHOWN.items():
        own = [row for row in rows if row["plugin"] == plugin]
        f1, auroc, _, early, late = _against(own, base)
        lines.append(
            f"- {words} (`plugin={plugin}`): JSD between epochs {early} in the first two thirds of "
            f"the training and {late} in the last third, F1 {f1}, AUROC {auroc}, entropy / ln N "
            f"{_entropy(own)} ({_entropy(base)} without)."
        )
    return "\n".join(lines)


def overall(measured: Row) -> str:
    """Each plug-in over all models and data sets."""
    rows = _of(measured, "table")
    base = [row for row in rows if row["plugin"] == "none"]
    titles = ["plug-in", *_DIFFERENCES, "entropy"]
    lines = [table_row(*titles), table_rule(1, len(titles) - 1)]
    for plugin in _values(rows, "plugin"):
        own = [row for row in rows if row["plugin"] == plugin]
        cells = ["", "", "", "1", "1"] if plugin == "none" else _against(own, base)
        lines.append(table_row(f"`{plugin}`", *cells, _entropy(own)))
    return "\n".join(lines)


def certain(measured: Row) -> str:
    """The cells of data, model, plug-in and metric whose interval does not hold 0."""
    rows = _of(measured, "table")
    base = [row for row in rows if row["plugin"] == "none"]
    n_cells, lines = 0, []
    for plugin, data, model, key in itertools.product(
        _values(rows, "plugin")[1:], _values(rows, "data"), _values(rows, "model"), ("f1", "auroc")
    ):
        own = [r for r in rows if (r["plugin"], r["data"], r["model"]) == (plugin, data, model)]
        differences = paired(own, base, key)
        n_cells += 1
        _, low, high = interval(differences)
        if low > 0 or high < 0:
            name = {"f1": "F1", "auroc": "AUROC"}[key]
            lines.append(f"- `{plugin}`, `{data}`, {model}: {name} {_interval(differences)}")
    return "\n".join(
        [
            f"Of {n_cells} cells (plug-in, data, model, metric) {len(lines)} have an interval "
            f"without 0, where chance alone gives {0.05 * n_cells:.0f}:",
            "",
            *lines,
        ]
    )


def seeds(measured: Row) -> str:
    """What a seed alone does, without any plug-in."""
    first = [row for row in _of(measured, "table") if row["plugin"] == "none" and row["seed"] == 0]
    rows = [*first, *_of(measured, "seeds")]
    titles = ["data", "model", "F1", "lowest to highest", *(c.title for c in MAIN[1:5])]
    lines = [table_row(*titles), table_rule(2, len(titles) - 2)]
    for data in _values(rows, "data"):
        for model in _values(rows, "model"):
            own = [row for row in rows if (row["data"], row["model"]) == (data, model)]
            f1 = [row["f1"] for row in own]
            cells = [_mean_sd(own, column) for column in MAIN[:5]]
            lines.append(
                table_row(
                    f"`{data}`", model, cells[0], f"{min(f1):.2f} to {max(f1):.2f}", *cells[1:]
                )
            )
    return "\n".join(lines)


def choice(measured: Row) -> str:
    """Settings of the anchor, judged on validation."""
    rows = _of(measured, "choice")
    base = [row for row in _of(measured, "table") if row["plugin"] == "none"]
    titles = ["plug-in", "weight", "decay", "schedule", "runs", "Δ(AUROC + F1)/2", "Δloss"]
    titles += ["JSD, early", "JSD, late", "entropy"]
    lines = [table_row(*titles), table_rule(1, len(titles) - 1)]
    for setting in sorted({_setting(row) for row in rows}, key=str):
        own = [row for row in rows if _setting(row) == setting]
        score = by_slides(
            lambda part: [
                (f1 + auroc) / 2
                for f1, auroc in zip(
                    paired(part, base, "val_f1"), paired(part, base, "val_auroc"), strict=True
                )
            ],
            own,
        )
        loss = by_slides(lambda part: paired(part, base, "val_loss"), own)
        plugin, weight, decay, schedule = setting
        cells = [f"`{plugin}`", f"{weight:g}", decay, schedule, str(len(own)), _interval(score)]
        lines.append(table_row(*cells, _interval(loss), *ratios(own, base), _entropy(own)))
    return "\n".join(lines)


def scope(measured: Row) -> str:
    """The block alone against encoder and block."""
    wide = _of(measured, "scope")
    pairs = {_pair(row) for row in wide}
    rows = [*wide, *(row for row in _of(measured, "table") if _pair(row) in pairs)]
    base = [row for row in rows if row["plugin"] == "none"]
    plugins = _values(wide, "plugin")
    titles = ["plug-in", "scope", "model", *_DIFFERENCES, "entropy"]
    lines = [table_row(*titles), table_rule(3, len(titles) - 3)]
    for plugin in plugins:
        for kind in ("block", "encoder"):
            for model in [*_values(rows, "model"), "all"]:
                own = [
                    row
                    for row in rows
                    if (row["plugin"], row["scope"]) == (plugin, kind)
                    and model in (row["model"], "all")
                ]
                cells = [*_against(own, base), _entropy(own)]
                lines.append(table_row(f"`{plugin}`", kind, model, *cells))
    return "\n".join(lines)


def cost(_: Row) -> str:
    """What a scope costs, as benchmarks/scope.py has measured it."""
    timed = json.loads(SCOPE_COST.read_text())
    titles = ["model", "bare, ms", "block", "encoder", "bare again", "mirrored by encoder"]
    lines = [
        f"CPU time of a training step of one thread, {timed['instances']:,} instances of width "
        f"{timed['width']}, hidden width {timed['hidden']} (torch {timed['machine']['torch']}, "
        "`python -m benchmarks.scope`), as ratios to the bare model, and parameters of the anchor:",
        "",
        table_row(*titles),
        table_rule(1, len(titles) - 1),
    ]
    for model in timed["models"]:
        block, encoder = (timed["ratios"][f"{model}, {scope}"] for scope in ("block", "encoder"))
        ratios = (block["ratio"], encoder["ratio"], block["control"])
        mirrored = (f"{row['mirrored_parameters']:,}" for row in (encoder, block))
        lines.append(
            table_row(
                model,
                f"{block['reference_milliseconds']:.1f}",
                *(f"{ratio:.2f}" for ratio in ratios),
                "{} (block {})".format(*mirrored),
            )
        )
    return "\n".join(lines)


PARTS = {
    "cost": cost,
    "certain": certain,
    "summary": summary,
    "overall": overall,
    "each": each,
    "seeds": seeds,
    "choice": choice,
    "scope": scope,
}


def page(text: str, measured: Row) -> str:
    """The page with its generated parts."""
    return fill(text, PARTS, measured)


def main() -> None:
    """Measure, if there is a folder of runs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, nargs="?", help="folder with the folders of the runs")
    root = parser.parse_args().root
    if root is not None:
        rows = [
            measure_run(run, kind)
            for kind in SETS
            for run in track(read_runs(root / kind), f"reading {kind}")
        ]
        measured = {"torch": torch.__version__, "runs": rows}
        # A row is a line, so that a change of one run is a change of one line.
        text = json.dumps(measured, separators=(",", ":")).replace("},{", "},\n{")
        MEASURED.write_text(f"{text}\n")
    measured = json.loads(MEASURED.read_text())
    for file in PAGES:
        file.write_text(page(file.read_text(), measured))


def _of(measured: Row, kind: str) -> list[Row]:
    rows: list[Row] = [row for row in measured["runs"] if row["set"] == kind]
    return sorted(rows, key=lambda row: (row["data"], row["model"], row["plugin"] != "none"))


def _values(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _setting(row: Row) -> tuple[str, float, str, str]:
    schedule = row["schedule"]
    name = schedule if isinstance(schedule, str) else schedule["_target_"].rpartition(".")[2]
    decay = f"{row['decay']:g}{', warmed up' * row['warmup']}"
    return row["plugin"], float(row["weight"]), decay, name


def _against(own: Sequence[Row], base: Sequence[Row]) -> list[str]:
    differences = [
        by_slides(lambda part, key=key: paired(part, base, key), own)
        for key in ("f1", "auroc", "tile_auroc")
    ]
    return [*(_interval(values) if values else "" for values in differences), *ratios(own, base)]


def ratios(own: Sequence[Row], base: Sequence[Row]) -> list[str]:
    """Geometric means of the JSD's ratio to the same run without a plug-in, early and late."""
    means = []
    for key in ("jsd_early", "jsd"):
        known = {_pair(row): row[key] for row in base}
        means.append(fmean(math.log(row[key] / known[_pair(row)]) for row in own))
    return [f"x {math.exp(mean):.2f}" for mean in means]


def _entropy(rows: Sequence[Row]) -> str:
    return f"{fmean(row['entropy'] for row in rows):.2f}"


def _interval(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _mean_sd(rows: Sequence[Row], column: Column) -> str:
    values = [column.factor * row[column.key] for row in rows if column.key in row]
    if not values:
        return ""
    spread = f"±{stdev(values):.{column.digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{column.digits}f}{spread}"


if __name__ == "__main__":
    main()
