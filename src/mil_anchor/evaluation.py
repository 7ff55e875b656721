"""What a run measures with the checkpoint that it has chosen."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from mil_anchor.callbacks.monitor import read_attention
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.data.folder import SlideDataModule
from mil_anchor.evidence import write_evidence
from mil_anchor.inspection import inspect_model
from mil_anchor.maps.recorder import MapRecorder
from mil_anchor.module import MILModule, Prediction
from mil_anchor.predictions import PREDICTIONS_FILE, write_predictions
from mil_anchor.results import attention_summary
from mil_anchor.sites.base import Site

log = logging.getLogger(__name__)


def evaluate(
    trainer: Trainer,
    module: MILModule,
    *,
    data: BagDataModule,
    parts: Sequence[str],
    checkpoint: str,
    maps: MapRecorder,
    n_drawn: int,
) -> dict[str, float | str]:
    """Measure a checkpoint; write its predictions, its attention maps and what they are worth.

    Args:
        trainer: Its default root folder is the run folder.
        module: The model.
        data: The bags.
        parts: Those of ``val`` and ``test`` to be measured.
        checkpoint: The file.
        maps: The Trainer's callback that keeps the maps.
        n_drawn: Number of test slides to draw heat maps of.

    Returns:
        Metrics of these parts, and what the run's ``attention.csv`` and maps say. A metric that is
        not defined, such as the AUROC of one class, is left out.
    """
    folder = Path(trainer.default_root_dir)
    if maps.site is None and maps.found is None and not maps.gave_up:
        maps.found = _site_without_a_fit(module, data)
    measured: dict[str, float | str] = {}
    rows: list[tuple[str, Prediction]] = []
    measure_of = {"val": trainer.validate, "test": trainer.test}
    for part in parts:
        if part not in data.parts:
            log.warning("No slides for %s, so nothing is measured there.", part)
            continue
        (of_part,) = measure_of[part](module, datamodule=data, ckpt_path=checkpoint, verbose=False)
        measured |= of_part
        rows += [(part, prediction) for prediction in module.predictions]
    attention = folder / "attention.csv"
    measured |= attention_summary(read_attention(attention) if attention.exists() else [])
    if trainer.is_global_zero:
        if isinstance(data, SlideDataModule) and not maps.path.exists() and not maps.gave_up:
            log.warning("No attention maps: these slides have neither coordinates nor tile labels.")
        write_predictions(folder / PREDICTIONS_FILE, rows)
        measured |= write_evidence(folder, mpp=data.mpp, n_drawn=n_drawn)
    return {key: value for key, value in measured.items() if value == value}


def _site_without_a_fit(module: MILModule, data: BagDataModule) -> Site | None:
    """Where the attention is, when the fit was complete before this process began."""
    try:
        return inspect_model(copy.deepcopy(module.model), width=data.in_features).site.within(
            "model"
        )
    except ValueError as error:
        log.warning("No attention maps: %s", error)
        return None
