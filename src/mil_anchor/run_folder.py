"""The folder of one run: its name, what it holds, and whether a run may go on in it."""

import csv
import io
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.maps.file import MAPS_FILE
from mil_anchor.module import Prediction
from mil_anchor.results import METRICS_FILE, read_metrics

# What may differ between an interrupted run and the one that continues it.
_NOT_COMPARED = {
    "resume",
    "out",
    "logger",
    "trainer.enable_progress_bar",
    "data.keep_in_memory",
}
# File systems take names of 255 bytes.
_LONGEST_NAME = 180
# What a run writes besides its configuration.
_FILES = (
    METRICS_FILE,
    "split.csv",
    "predictions.csv",
    "attention.csv",
    MAPS_FILE,
    "localization.csv",
)
_FOLDERS = ("checkpoints", "logs", "heatmaps", "bag_features")


def folder_name(names: DictConfig, seed: int, fold: int, overrides: str) -> str:
    """``model/plugin/data/seed=0,fold=0``, then what else the command line set.

    A slash in a value does not make a folder, and a long name ends in a hash of what was cut.
    """
    own = ",".join(part for part in (f"seed={seed}", f"fold={fold}", overrides) if part)
    own = own.replace("/", "_")
    if len(own) > _LONGEST_NAME:
        own = f"{own[:_LONGEST_NAME]}-{sha256(own.encode()).hexdigest()[:8]}"
    return "/".join((names.model, names.plugin, names.data, own))


def prepare_folder(folder: Path, resolved: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder ready; the result if it holds a complete run of this configuration.

    Nothing is left of a run that is not continued: one that ``resume=false`` replaces, or that
    stopped before its first checkpoint, perhaps on other data.
    """
    file = folder / "config.yaml"
    begun = any((folder / name).exists() for name in (METRICS_FILE, "checkpoints/last.ckpt"))
    if resolved["resume"] and begun:
        earlier: Any = OmegaConf.to_container(OmegaConf.load(file))
        changed = sorted(_flat(earlier).items() ^ _flat(resolved).items())
        if changed:
            raise ValueError(
                f"{folder} holds a run of another configuration; these differ: "
                f"{sorted({key for key, _ in changed})}. Choose another out=..., or resume=false "
                "to replace that run."
            )
        if (folder / METRICS_FILE).exists():
            return read_metrics(folder)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        if not resolved["resume"] or (file.exists() and not begun):
            for name in _FILES:
                (folder / name).unlink(missing_ok=True)
            for name in _FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, OmegaConf.to_yaml(OmegaConf.create(resolved)))
    return None


def write_parts(file: Path, data: BagDataModule) -> None:
    """Write ``split.csv``, the part of each bag, which ``data.splits`` and ``data.labels`` read.

    Raises:
        ValueError: If the run to be continued was begun with other bags, labels or parts.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide_id", "label", "split"])
    for part, bags in data.parts.items():
        for bag_id, label in zip(bags.bag_ids, bags.labels, strict=True):
            writer.writerow([bag_id, label, part])
    # Files keep their names when their content changes: the run may have trained on test bags.
    is_begun = (file.parent / "checkpoints" / "last.ckpt").exists() and file.exists()
    if is_begun and file.read_text() != text.getvalue():
        raise ValueError(
            f"A run must go on with the slides, labels and parts that it was begun with, but those "
            f"of the data differ from {file} now. Choose another out=..., or resume=false to "
            "replace that run."
        )
    _write(file, text.getvalue())


def write_predictions(file: Path, rows: list[tuple[str, Prediction]]) -> None:
    """Write ``predictions.csv`` from the part and prediction of each bag."""
    n_classes = len(rows[0][1].probabilities)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["bag_id", "label", "split", *(f"prob_{c}" for c in range(n_classes))])
        writer.writerows([row.bag_id, row.label, part, *row.probabilities] for part, row in rows)


@rank_zero_only
def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json``: last of all files and in one piece, for it says "complete"."""
    _write(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")


def _flat(node: Any, path: str = "") -> dict[str, str]:
    if path in _NOT_COMPARED:
        return {}
    if not isinstance(node, dict):
        return {path: repr(node)}
    children = (_flat(child, f"{path}.{name}".lstrip(".")) for name, child in node.items())
    return {key: value for child in children for key, value in child.items()}


def _write(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)
