"""Every run for itself: what it measured, its configuration, its environment, its error."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mil_anchor.environment import read_environment
from mil_anchor.failure import ERROR_FILE
from mil_anchor.results import Run, Unfinished

_NAMES = ("data", "model", "plugin", "seed", "fold")
_SUMMARY = {"test/f1": "F1", "test/auroc": "AUROC", "test/accuracy": "accuracy"}


def runs_html(runs: Sequence[Run], unfinished: Sequence[Unfinished]) -> str:
    """A ``<details>`` for each run, those first that are not complete."""
    parts = [_unfinished_html(run) for run in unfinished]
    return "".join(parts + [_run_html(run) for run in runs])


def _run_html(run: Run) -> str:
    metrics = run.metrics
    figures = ", ".join(
        f"{title} {metrics[key]:.3f}" for key, title in _SUMMARY.items() if key in metrics
    )
    numbers = {key: value for key, value in metrics.items() if key not in _NAMES}
    return _details(
        (*run.cell, *run.draw),
        badge='<span class="badge">complete</span>',
        aside=figures,
        body=_folder(run.folder) + _pairs("Metrics", numbers) + _files(run.folder),
    )


def _unfinished_html(run: Unfinished) -> str:
    return _details(
        (run.data, run.model, run.plugin, run.seed, run.fold),
        badge='<span class="badge bad">unfinished</span>',
        aside=run.reason,
        body=_folder(run.folder) + _text(run.folder / ERROR_FILE, "Error") + _files(run.folder),
    )


def _details(names: tuple[str | int | None, ...], *, badge: str, aside: str, body: str) -> str:
    data, model, plugin, seed, fold = ("?" if name is None else escape(str(name)) for name in names)
    return (
        f'<details class="run" data-data="{data}" data-model="{model}" data-plugin="{plugin}">'
        f"<summary>{badge} <b>{model} + {plugin}</b> on {data}, seed {seed}, fold {fold} "
        f'<span class="aside">{escape(aside)}</span></summary>{body}</details>'
    )


def _folder(folder: Path) -> str:
    return f'<p class="folder"><code>{escape(str(folder))}</code></p>'


def _files(folder: Path) -> str:
    return _text(folder / "config.yaml", "Configuration") + _pairs(
        "Environment", read_environment(folder)
    )


def _text(file: Path, title: str) -> str:
    if not file.exists():
        return ""
    text = file.read_text(errors="replace")
    return f"<h4>{title}</h4><pre>{escape(text)}</pre>"


def _pairs(title: str, values: dict[str, Any]) -> str:
    if not values:
        return f'<h4>{title}</h4><p class="note">Not kept by this run.</p>'
    rows = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(_said(value))}</dd></div>"
        for key, value in values.items()
    )
    return f"<h4>{title}</h4><dl>{rows}</dl>"


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
