"""Reads run folders: those that are complete, and those that are not."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from mil_anchor.callbacks.monitor import MEASURES, AttentionRow, read_attention
from mil_anchor.failure import ERROR_FILE, read_error
from mil_anchor.settings import bearing, flat_config, telling_keys

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
_NAMES = ("model", "plugin", "data", "seed", "fold")
CellKey = tuple[str, str, str]
# Is called with what there is to be done, and gives it piece by piece.
Progress = Callable[[Sequence[Any]], Iterable[Any]]


class Run(NamedTuple):
    """A complete run.

    Args:
        folder: Where it lies.
        metrics: What its ``metrics.json`` says, without what is not defined, such as the AUROC of
            test bags of one class.
        config: Its configuration by dotted keys; None if there is no ``config.yaml``.
        setting: What tells it from runs of the same names, such as ``plugin.weight=0.1``.
    """

    folder: Path
    metrics: dict[str, Any]
    config: dict[str, str] | None = None
    setting: str = ""

    @property
    def cell(self) -> CellKey:
        """Data, model, and plug-in with its setting: runs of a cell differ in seed and fold."""
        of = self.metrics
        return cell_key(of["data"], of["model"], of["plugin"], self.setting)

    @property
    def draw(self) -> tuple[int, int]:
        """Seed and fold."""
        return self.metrics["seed"], self.metrics["fold"]

    def attention(self) -> list[AttentionRow]:
        """The run's ``attention.csv``."""
        return read_attention(self.folder / "attention.csv")


class Unfinished(NamedTuple):
    """A run folder without a result.

    Names are ``?``, and numbers and the configuration None, where nothing tells them.
    """

    folder: Path
    model: str
    plugin: str
    data: str
    seed: int | None
    fold: int | None
    reason: str
    config: dict[str, str] | None = None


def read_metrics(folder: Path) -> dict[str, Any]:
    """The ``metrics.json`` of a complete run.

    Raises:
        ValueError: It cannot be read.
    """
    file = folder / METRICS_FILE
    try:
        metrics = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} must hold a JSON object, but it is cut off or something else ({error}). "
            "Delete it, and the run goes on from its last checkpoint."
        ) from error
    if not isinstance(metrics, dict):
        raise ValueError(f"{file} must hold a JSON object, but a {type(metrics).__name__} came.")
    return metrics


def read_runs(*roots: Path, progress: Progress = iter) -> list[Run]:
    """All complete runs below folders, in the order of their paths.

    Runs of the same data, model and plug-in whose configurations differ get a ``setting`` that
    tells them apart. Of runs that repeat each other (a copy, the same sweep on another machine, or
    once more with ``maps=4``), the one with most metrics is taken: seeds that count twice are no
    further cases. What cannot be read is in `read_unfinished`.

    Args:
        roots: Folders; those inside others are read once.
        progress: Called with the folders to be read; gives them one by one.

    Raises:
        ValueError: There is no complete run.
    """
    runs: dict[Any, Run] = {}
    n_read = 0
    for folder in progress(_folders(roots, METRICS_FILE)):
        if not _why_foreign(folder):
            config = _read_config(folder)
            flat = None if config is None else flat_config(config)
            run = Run(folder, _defined(read_metrics(folder)), flat)
            n_read += 1
            key = _identity(run)
            if key not in runs or len(run.metrics) > len(runs[key].metrics):
                runs[key] = run
    if not runs:
        raise ValueError(
            f"{', '.join(map(str, roots))} must hold complete runs, but there is no "
            f"{METRICS_FILE} of a run below it. Run 'python run.py' first, or name another folder."
        )
    if n_read > len(runs):
        log.warning("%d run(s) left out, which repeat others of those read", n_read - len(runs))
    ordered = sorted(runs.values(), key=lambda run: run.folder)
    keys = keys_by_names(ordered)
    return [run._replace(setting=setting_of(run.config, keys.get(run.cell))) for run in ordered]


def read_unfinished(*roots: Path) -> list[Unfinished]:
    """Run folders without a result, and files that pose as one.

    The reason is the exception in ``error.txt`` or, without one, that the run was interrupted.
    """
    found = []
    for folder in _folders(roots, METRICS_FILE, ERROR_FILE, "config.yaml"):
        reason = _why_unfinished(folder)
        if reason:
            config = _read_config(folder)
            names = _named(folder, config)
            # Other programs have files of these names, too.
            if names[0] != "?" or not (folder / "config.yaml").exists():
                flat = None if config is None else flat_config(config)
                found.append(Unfinished(folder, *names, reason, flat))
    return found


def by_cell(runs: Iterable[Run]) -> dict[CellKey, list[Run]]:
    """Runs of each data set, model and plug-in with its setting, sorted; ``none`` stands first."""

    def place(run: Run) -> tuple[Any, ...]:
        data, model, plugin = run.cell
        return data, model, run.metrics["plugin"] != "none", plugin

    cells: dict[CellKey, list[Run]] = {}
    for run in sorted(runs, key=place):
        cells.setdefault(run.cell, []).append(run)
    return cells


def cell_key(data: str, model: str, plugin: str, setting: str) -> CellKey:
    """The cell of runs of these names and this `setting_of`."""
    return data, model, f"{plugin} ({setting})" if setting else plugin


def keys_by_names(runs: Iterable[Run]) -> dict[CellKey, list[str]]:
    """What tells runs of the same names apart, where one of them has a configuration."""
    alike: dict[CellKey, list[tuple[dict[str, str], Run]]] = {}
    for run in runs:
        if run.config is not None:
            alike.setdefault(run._replace(setting="").cell, []).append((run.config, run))
    return {
        names: telling_keys([config for config, _ in own], [run.draw for _, run in own])
        for names, own in alike.items()
    }


def setting_of(config: Mapping[str, str] | None, keys: Sequence[str] | None) -> str:
    """What tells a run from others of its names, by the keys that `keys_by_names` has for them."""
    if keys is None:  # none of them has a configuration
        return ""
    if config is None:
        return "no config.yaml"
    return ", ".join(f"{key}={config[key]}" for key in keys if key in config)


def attention_summary(rows: Sequence[AttentionRow]) -> dict[str, float]:
    """What ``metrics.json`` says of the attention on validation bags: means over bags.

    ``attention/jsd`` is the mean over all epochs, ``attention/jsd_last_third`` that over the last
    third of them (rounded up), when a schedule may have slowed the training, and
    ``attention/jsd_first_two_thirds`` that over those before. All others
    (``rank_correlation``, ``entropy``, ``top1pct``, ``top10``, ``auroc``, ``mixing_correlation``)
    are of the last epoch. What is not defined is left out.
    """
    epochs = sorted({row.epoch for row in rows})
    last_third = set(epochs[-math.ceil(len(epochs) / 3) :])
    summary = {
        "jsd": _mean(rows, "jsd"),
        "jsd_first_two_thirds": _mean([r for r in rows if r.epoch not in last_third], "jsd"),
        "jsd_last_third": _mean([row for row in rows if row.epoch in last_third], "jsd"),
    }
    for measure in MEASURES:
        if measure != "jsd":
            summary[measure] = _mean([row for row in rows if row.epoch == epochs[-1]], measure)
    return {f"attention/{name}": value for name, value in summary.items() if value is not None}


def _mean(rows: Sequence[AttentionRow], measure: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, measure)) is not None]
    return fmean(values) if values else None


def _folders(roots: Sequence[Path], *names: str) -> list[Path]:
    """Folders below the roots that hold one of the files; Hydra's own copy is none."""
    found: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root} must be a folder of run folders, but there is none.")
        for name in names:
            for file in root.rglob(name):
                if file.parent.name != ".hydra":
                    found.setdefault(file.parent.resolve(), file.parent)
    return sorted(found.values())


def _identity(run: Run) -> Any:
    """Equal for runs of one result: names, seed, fold, and what else bears on it."""
    config = run.config or {}
    return run.cell, run.draw, frozenset(bearing(config).items()), config.get("out")


def _defined(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in metrics.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def _why_foreign(folder: Path) -> str:
    """Why a ``metrics.json`` is not that of a run; empty if it is."""
    try:
        metrics = read_metrics(folder)
    except ValueError as error:
        return str(error)
    numbers = ("seed", "fold")
    lacking = [
        name
        for name in _NAMES
        if not isinstance(metrics.get(name), int if name in numbers else str)
    ]
    return f"its {METRICS_FILE} is not of a run: {lacking} are not in it" if lacking else ""


def _why_unfinished(folder: Path) -> str:
    if (folder / METRICS_FILE).exists():
        return _why_foreign(folder)
    said = read_error(folder)
    return "interrupted, or still running" if said is None else said or "failed"


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a run; None if there is none, or another program's file."""
    try:
        # In C, for hundreds of runs: OmegaConf takes 50 times as long.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        config = yaml.load((folder / "config.yaml").read_text(), loader)
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return None
    try:
        is_own = set(config["names"]) >= {"model", "plugin", "data"}
        return config if is_own and {"seed"} <= set(config) and "fold" in config["data"] else None
    except (KeyError, TypeError):
        return None


def _named(
    folder: Path, config: dict[str, Any] | None
) -> tuple[str, str, str, int | None, int | None]:
    """Model, plug-in, data, seed and fold of a run without a result."""
    if config is not None:
        names = config["names"]
        return (
            names["model"],
            names["plugin"],
            names["data"],
            config["seed"],
            config["data"]["fold"],
        )
    # A run that fails before it writes its configuration has a folder already.
    drawn = re.match(r"seed=(\d+),fold=(\d+)", folder.name)
    if drawn is None or len(folder.parts) < 4:
        return "?", "?", "?", None, None
    model, plugin, data = folder.parts[-4:-1]
    return model, plugin, data, int(drawn[1]), int(drawn[2])
