"""The folder of one run: its name, what it holds, and whether a run may go on in it."""

import csv
import io
import json
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.data.tables import read_rows
from mil_anchor.failure import ERROR_FILE
from mil_anchor.maps.file import MAPS_FILE
from mil_anchor.predictions import PREDICTIONS_FILE
from mil_anchor.results import METRICS_FILE, read_metrics
from mil_anchor.settings import flat_config

CONFIG_FILE = "config.yaml"
SPLIT_FILE = "split.csv"
# What may differ between an interrupted run and the one that continues it.
_NOT_COMPARED = re.compile(
    r"resume|out|threads|logger(\..*)?|trainer\.enable_progress_bar|data\.keep_in_memory"
)
# File systems take names of 255 bytes.
_LONGEST_NAME = 180
# What a run writes besides its configuration.
_FILES = (
    METRICS_FILE,
    ERROR_FILE,
    SPLIT_FILE,
    PREDICTIONS_FILE,
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


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder against other processes, and keep in it why the run failed, if it does.

    ``error.txt`` has the traceback. A process that is killed lets go of the folder, too.

    Raises:
        ValueError: Another process holds it.
    """
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"A run folder must be written by one process at a time, but another is running in "
            f"{folder}. Wait until it is done, or choose another out=..."
        ) from error
    try:
        (folder / ERROR_FILE).unlink(missing_ok=True)
        yield
    except Exception:
        # What is wrong with this command says nothing of a run that is complete.
        if not (folder / METRICS_FILE).exists():
            write_text(folder / ERROR_FILE, traceback.format_exc())
        raise
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds a run folder."""
    if not folder.exists():
        return False
    try:
        with _lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


def completed(folder: Path, resolved: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run that is complete, or None if there is something left to do.

    Args:
        folder: Of the run.
        resolved: The configuration to be run in it.

    Raises:
        ValueError: The folder holds a run of another configuration.
    """
    if not resolved["resume"] or not _is_begun(folder):
        return None
    changed = differing(read_config(folder), resolved)
    if changed:
        raise ValueError(
            f"{folder} holds a run of another configuration; these differ: {changed}. Choose "
            "another out=..., or resume=false to replace that run."
        )
    return read_metrics(folder) if (folder / METRICS_FILE).exists() else None


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run in a folder."""
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE))  # type: ignore[assignment]
    return config


def differing(config: Any, other: Any) -> list[str]:
    """The keys by which two resolved configurations are other runs."""
    return sorted({key for key, _ in _compared(config).items() ^ _compared(other).items()})


def prepare_folder(folder: Path, resolved: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder ready; the result if it holds a complete run of this configuration.

    Nothing is left of a run that is not continued: one that ``resume=false`` replaces, or that
    stopped before its first checkpoint, perhaps on other data.

    Raises:
        ValueError: The folder holds a run of another configuration.
    """
    done = completed(folder, resolved)
    if done is not None:
        return done
    file = folder / CONFIG_FILE
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        if not resolved["resume"] or (file.exists() and not _is_begun(folder)):
            for name in _FILES:
                (folder / name).unlink(missing_ok=True)
            for name in _FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, OmegaConf.to_yaml(OmegaConf.create(resolved)))
    return None


def write_parts(file: Path, data: BagDataModule) -> None:
    """Write ``split.csv``, the part of each bag, which ``data.splits`` and ``data.labels`` read.

    It has the case of each bag, too, where some cases have several bags.

    Raises:
        ValueError: If the run to be continued was begun with other bags, labels or parts.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide_id", "label", "split", *(["case_id"] if data.cases else [])])
    for part, bags in data.parts.items():
        for bag_id, label in zip(bags.bag_ids, bags.labels, strict=True):
            writer.writerow([bag_id, label, part, *([data.cases[bag_id]] if data.cases else [])])
    # Files keep their names when their content changes: the run may have trained on test bags.
    is_begun = (file.parent / "checkpoints" / "last.ckpt").exists() and file.exists()
    if is_begun and file.read_text() != text.getvalue():
        raise ValueError(
            f"A run must go on with the slides, labels and parts that it was begun with, but those "
            f"of the data differ from {file} now. Choose another out=..., or resume=false to "
            "replace that run."
        )
    write_text(file, text.getvalue())


def read_cases(folder: Path) -> dict[str, str]:
    """The case of each bag of a run by its id; empty where every bag is its own."""
    file = folder / SPLIT_FILE
    rows = read_rows(file) if file.exists() else []
    return {row["slide_id"]: row["case_id"] for row in rows if "case_id" in row}


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint in one piece: a run that is killed meanwhile goes on from the last one.

    Lightning moves a temporary file to its place, which is copied there, byte by byte over the
    last one, where the folder for temporary files is on another file system.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        partial = Path(f"{path}.partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        partial.replace(path)


@rank_zero_only
def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json``: last of all files and in one piece, for it says "complete"."""
    write_text(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file in one piece: nobody reads half of it."""
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / ".lock")


def _is_begun(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS_FILE, "checkpoints/last.ckpt"))


def _compared(config: Any) -> dict[str, str]:
    return {
        key: value for key, value in flat_config(config).items() if not _NOT_COMPARED.fullmatch(key)
    }
