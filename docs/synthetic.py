"""Measures the runs behind synthetic.md, and writes its figures and generated parts.

`python -m docs.synthetic ROOT` reads the complete runs below ROOT, which conf/experiment/
synthetic_abmil.yaml makes, and writes synthetic.json and figures/; without ROOT, the page alone is
written anew from synthetic.json.
"""

import argparse
import inspect
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.progress import track

from docs.pages import fill, table_row, table_rule
from docs.synthetic_figures import draw_cohort, draw_curves, draw_epochs
from docs.synthetic_measures import Curves, Setting, measure_cohort, measure_run, read_curves
from mil_anchor.data.synthetic import PRESETS, SIZES, Preset, WitnessRange
from mil_anchor.results import Run, read_runs

PAGE = Path(__file__).parent / "synthetic.md"
MEASURED = PAGE.with_suffix(".json")
FIGURES = PAGE.parent / "figures"
N_WORLDS = 5


def matches() -> str:
    """What the parts of a preset match, in the words of its docstring, and their values."""
    arguments = (inspect.getdoc(Preset) or "").split("Args:\n")[1].split("\n\n")[0]
    documented = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", arguments, re.DOTALL | re.MULTILINE)
    lines = [table_row("", *(f"`{name}`" for name in PRESETS)), table_rule(1, len(PRESETS))]
    for name, text in documented:
        values = (_value(getattr(preset, name)) for preset in PRESETS.values())
        lines.append(table_row(f"**{name}**: {' '.join(text.split())}", *values))
    return "\n".join(lines)


def sizes() -> str:
    """Slides, tiles and widths."""
    lines = [table_row("`data.size`", "slides", "tiles, median", "width", "GB"), table_rule(1, 4)]
    for name, size in SIZES.items():
        # The mean of a log-normal variable is above its median.
        spread = PRESETS["camelyon_like"].size_spread
        n_bytes = 4 * size.n_slides * size.n_tiles * math.exp(spread**2 / 2) * size.width
        counts = (f"{size.n_slides}", f"{size.n_tiles:,}", f"{size.width}", f"{n_bytes / 1e9:.2g}")
        lines.append(table_row(f"`{name}`", *counts))
    return "\n".join(lines)


def checks(measured: dict[str, Any]) -> str:
    """What was measured in small cohorts."""
    worlds = {len(of_preset) for of_preset in measured["cohorts"].values()}
    lines = [
        f"Mean ± sd over {_only(worlds)} worlds of size `small`:",
        "",
        table_row("", *(f"`{name}`" for name in PRESETS)),
        table_rule(1, len(PRESETS)),
    ]
    for title, key, digits, factor in _CHECKS:
        of_presets = [[row[key] for row in measured["cohorts"][name]] for name in PRESETS]
        lines.append(table_row(title, *(_mean_sd(own, digits, factor) for own in of_presets)))
    return "\n".join(lines)


def failures(measured: dict[str, Any]) -> str:
    """What plain ABMIL does on the cohort."""
    settings: dict[Setting, list[dict[str, Any]]] = {}
    for row in measured["runs"]:
        setting = Setting(row["preset"], row["size"], row["n_epochs"])
        settings.setdefault(setting, []).append(row)
    columns = sorted(
        settings,
        key=lambda s: (list(SIZES).index(s.size), s.n_epochs, list(PRESETS).index(s.preset)),
    )
    n_worlds = _only({len(runs) for runs in settings.values()})
    minutes = sum(row["fit_s"] for row in measured["runs"]) / 60
    lines = [
        f"Mean ± sd over {n_worlds} worlds, one run each (torch {measured['torch']}; all runs took "
        f"{minutes:.0f} minutes of one thread):",
        "",
        table_row("", *(f"`{s.preset}` {s.size}, {s.n_epochs} epochs" for s in columns)),
        table_rule(1, len(columns)),
    ]
    for title, key, digits, factor in _FAILURES:
        if key is None:
            lines.append(table_row(f"**{title}**", *[""] * len(columns)))
            continue
        values = ([row[key] for row in settings[setting]] for setting in columns)
        lines.append(table_row(title, *(_mean_sd(own, digits, factor) for own in values)))
    return "\n".join(lines)


def page(text: str, measured: dict[str, Any]) -> str:
    """The page with its generated parts."""
    parts = {
        "matches": matches,
        "sizes": sizes,
        "checks": partial(checks, measured),
        "failures": partial(failures, measured),
    }
    return fill(text, parts)


def main() -> None:
    """Measure and draw, if there is a folder of runs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, nargs="?", help="folder with run folders")
    root = parser.parse_args().root
    if root is not None:
        torch.set_num_threads(1)
        runs = sorted(read_runs(root), key=lambda run: (Setting.of(run), run.metrics["fold"]))
        curves = [read_curves(run) for run in track(runs, "reading runs")]
        measured = {
            "torch": torch.__version__,
            "cohorts": {
                preset: [measure_cohort(preset, world) for world in range(N_WORLDS)]
                for preset in track(PRESETS, "measuring cohorts")
            },
            "runs": [measure_run(*pair) for pair in zip(runs, curves, strict=True)],
        }
        MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
        _draw(runs, curves)
    PAGE.write_text(page(PAGE.read_text(), json.loads(MEASURED.read_text())))


def _draw(runs: Sequence[Run], curves: Sequence[Curves]) -> None:
    drawn: dict[str, list[Curves]] = {preset: [] for preset in PRESETS}
    for run, own in zip(runs, curves, strict=True):
        setting = Setting.of(run)
        if (setting.size, setting.n_epochs) != ("small", 40):
            continue
        if not drawn[setting.preset]:
            draw_epochs(run.folder, FIGURES / f"epochs_{setting.preset}.png")
        drawn[setting.preset].append(own)
    draw_curves(drawn, FIGURES / "curves.png")
    draw_cohort(FIGURES / "cohort.png")


# Title, key in the measured figures, digits, factor.
_CHECKS = (
    ("slope of the feature spectrum, both axes logarithmic", "spectrum_slope", 2, 1),
    ("cosine of tiles side by side", "neighbour_cosine", 2, 1),
    ("sd of the logarithm of tiles per slide", "tiles_log_sd", 2, 1),
    ("witness rate, median over slides with a lesion, %", "witness_median", 1, 100),
    ("of these slides, below 1 %, %", "witness_below_1pct", 0, 100),
    ("linear tile probe, AUROC, validation", "tile_val", 2, 1),
    ("linear tile probe, AUROC, held-out centre", "tile_test", 2, 1),
    ("mean pooling and a linear model, AUROC, validation", "pooled_val", 2, 1),
    ("mean pooling and a linear model, AUROC, held-out centre", "pooled_test", 2, 1),
    ("artefact as the sign of a lesion, AUROC, training and validation", "artefact_fit", 2, 1),
    ("artefact as the sign of a lesion, AUROC, held-out centre", "artefact_test", 2, 1),
)
_FAILURES: tuple[tuple[str, str | None, int, int], ...] = (
    ("jumping", None, 0, 1),
    ("JSD x 1000, first third of the epochs", "jsd_third", 1, 1000),
    ("JSD x 1000, first two thirds", "jsd_two_thirds", 1, 1000),
    ("JSD x 1000, in the worst epoch", "jsd_largest", 0, 1000),
    ("rank correlation, first two thirds", "rank_two_thirds", 3, 1),
    ("another first tile than an epoch before, first two thirds, %", "changed_two_thirds", 0, 100),
    ("concentration", None, 0, 1),
    ("entropy / ln N, first epoch", "entropy_first", 2, 1),
    ("entropy / ln N, last epoch", "entropy_last", 2, 1),
    ("largest weight, last epoch, %", "largest_last", 0, 100),
    ("weight of the first 1 % of tiles, last epoch, %", "top_share_last", 0, 100),
    ("overfitting", None, 0, 1),
    ("validation loss, lowest", "val_loss_lowest", 2, 1),
    ("in epoch (from 0)", "val_loss_lowest_epoch", 0, 1),
    ("validation loss, last epoch", "val_loss_last", 2, 1),
    ("training loss, last epoch", "train_loss_last", 4, 1),
    ("validation AUROC in the epoch of the lowest loss", "val_auroc_lowest", 2, 1),
    ("validation AUROC, last epoch", "val_auroc_last", 2, 1),
    ("checkpoint chosen on validation", None, 0, 1),
    ("its epoch (from 0)", "best_epoch", 0, 1),
    ("validation AUROC", "val/auroc", 2, 1),
    ("test AUROC", "test/auroc", 2, 1),
    ("test F1", "test/f1", 2, 1),
    ("its prediction as the sign of an artefact, test, AUROC", "artefact_auroc", 2, 1),
    ("attention as the sign of a lesion tile, AUROC", "localization/auroc", 2, 1),
    ("the same, average precision", "localization/average_precision", 2, 1),
    ("lesions hit (attention above half of the largest), %", "localization/lesion_any", 0, 100),
    ("Dice", "localization/dice", 2, 1),
    ("specificity", "localization/specificity", 3, 1),
    ("FROC", "localization/froc", 2, 1),
)


def _mean_sd(values: Sequence[float], digits: int, factor: float) -> str:
    scaled = [factor * value for value in values]
    return f"{fmean(scaled):.{digits}f} ± {stdev(scaled):.{digits}f}"


def _value(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    if not isinstance(value[0], WitnessRange):
        return ", ".join(map(str, value))
    kinds = [f"{kind.low:.3g} to {kind.high:.3g} ({kind.probability:.0%})" for kind in value]
    return ", ".join(kinds)


def _only(values: set[int]) -> int:
    (value,) = values
    return value


if __name__ == "__main__":
    main()
