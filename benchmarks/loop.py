"""What does a whole fit cost beside a plain PyTorch loop over the same bags?

ABMIL (384-128) on 1000 tiles, the same epochs and validations three ways: a loop written by hand;
a bare Trainer with our module and data; and everything that run.py sets up: repacked file, data
module, monitor, costs, random state, CSV logger and checkpoints. The time is that of a fit of 40
epochs, as the protocol has: its first epoch, in which the attention is found and a step's cost is
counted, and 39 times the one after it. Imports, data, models and Lightning's sanity check come
before. With bags of 10 tiles the same shows what the loop itself costs for each bag.
Run: python -m benchmarks.loop
"""

import csv
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from baselines.abmil import ABMIL
from benchmarks.record import arguments, measured, show, start, write
from benchmarks.slides import RandomSlides
from benchmarks.timing import Timings, again, time_steps
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.data.folder import FolderDataModule
from mil_anchor.data.repack import repack
from mil_anchor.experiment import register_config, run
from mil_anchor.metrics import bag_metrics
from mil_anchor.module import MILModule
from mil_anchor.sweep.search import register_search

CONF = Path(__file__).resolve().parents[1] / "conf"
WIDTH, HIDDEN = 384, 128
# Fewer than CAMELYON16's 270: the shorter a fit, the surer one of its rounds is undisturbed.
N_TRAIN, N_VAL = 36, 4
# Epochs that are run, and those of the fit whose time is told.
N_EPOCHS, N_EPOCHS_OF_FIT = 2, 40
PLAIN = "plain loop"
# Of the bags of 10 tiles, for which no goal is set.
_FEW_ROUNDS = 3


class Clock(Callback):
    """Takes the CPU time at which each epoch of a fit begins, and at which the last one ends."""

    times: ClassVar[list[float]] = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            self.times.clear()
        self.times.append(time.process_time())

    @override
    def on_fit_end(self, *_: Any) -> None:
        self.times.append(time.process_time())


def main() -> None:
    """Time the fits and print what they cost."""
    chosen = start(arguments(__doc__, on_gpu=False))
    logging.getLogger("mil_anchor").setLevel(logging.ERROR)
    register_config()
    register_search()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = _time(1000, chosen.rounds)
        small = _time(10, min(chosen.rounds, _FEW_ROUNDS))
    n_bags = N_EPOCHS_OF_FIT * (N_TRAIN + N_VAL)
    table = Table("fit", "1000 tiles (ms)", f"/ {PLAIN}", "10 tiles (us per bag)")
    for name in whole.seconds:
        per_bag = 1000 * small.milliseconds(name) / n_bags
        figures = whole.milliseconds(name), whole.ratio(name), per_bag
        table.add_row(name, *(f"{figure:.4g}" for figure in figures))
    show(table)
    names = whole.seconds.keys() - {PLAIN, again(PLAIN)}
    ratios = {name: measured(whole, name) for name in sorted(names)}
    ratios |= {f"{name}, 10 tiles": measured(small, name) for name in sorted(names)}
    write("loop", ratios, chosen, train_bags=N_TRAIN, val_bags=N_VAL, epochs=N_EPOCHS_OF_FIT)


def _time(n_instances: int, rounds: int) -> Timings:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        slides = RandomSlides(
            folder / "source", n_slides=N_TRAIN + N_VAL, n_instances=n_instances, width=WIDTH
        )
        repack(slides, folder / "packed.h5", dtype="float32", progress=False)
        with (folder / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["slide_id", "label", "split"])
            for index, slide_id in enumerate(slides.slide_ids):
                writer.writerow([slide_id, index % 2, "train" if index < N_TRAIN else "val"])
        fits: dict[str, Callable[[], float]] = {
            PLAIN: partial(_plain, slides.features),
            "bare Trainer": partial(_bare, folder),
            "run.py": partial(_run_py, folder),
        }
        # A fit tells itself how long it took.
        return time_steps(fits, rounds=rounds, clock=lambda fit: float(fit()))  # type: ignore[arg-type]


def _of_fit(times: Sequence[float]) -> float:
    """Seconds of a whole fit, from the times between the epochs of a short one."""
    first, *_, last = times
    later = (last - times[1]) / (len(times) - 2)
    return times[1] - first + (N_EPOCHS_OF_FIT - 1) * later


def _model() -> ABMIL:
    torch.manual_seed(0)
    return ABMIL(WIDTH, 2, hidden=HIDDEN)


def _plain(features: Tensor) -> float:
    """A loop as one writes it by hand: Adam, cosine, metrics at the end of each epoch."""
    model, metrics = _model(), bag_metrics(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=N_EPOCHS * N_TRAIN)
    labels = torch.arange(len(features)) % 2
    times = [time.process_time()]
    for _ in range(N_EPOCHS):
        model.train()
        for index in torch.randperm(N_TRAIN).tolist():
            logits = model(features[index : index + 1]).logits
            loss = F.cross_entropy(logits, labels[index : index + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        metrics.reset()
        with torch.no_grad():
            for index in range(N_TRAIN, N_TRAIN + N_VAL):
                logits = model(features[index : index + 1]).logits
                metrics.update(logits.softmax(dim=1), labels[index : index + 1])
        metrics.compute()
        times.append(time.process_time())
    return _of_fit(times)


def _bare(folder: Path) -> float:
    trainer = Trainer(
        max_epochs=N_EPOCHS,
        accelerator="cpu",
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MILModule(_model(), n_classes=2), datamodule=_data(folder))
    return _of_fit(Clock.times)


def _data(folder: Path) -> BagDataModule:
    labels = folder / "labels.csv"
    return FolderDataModule(root=str(folder / "packed.h5"), labels=str(labels), splits=str(labels))


def _run_py(folder: Path) -> float:
    with tempfile.TemporaryDirectory() as out:
        composed = compose(
            "config",
            [
                "model=abmil",
                "data=folder",
                f"data.root={folder / 'packed.h5'}",
                f"data.labels={folder / 'labels.csv'}",
                f"data.splits={folder / 'labels.csv'}",
                f"hidden={HIDDEN}",
                "threads=1",
                "test=false",
                f"+plugin._target_={Clock.__module__}.Clock",
                f"trainer.max_epochs={N_EPOCHS}",
                "trainer.enable_progress_bar=false",
                f"out={out}",
                f"hydra.runtime.output_dir={out}",
            ],
            return_hydra_config=True,
        )
        HydraConfig.instance().set_config(composed)
        run(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]))
    return _of_fit(Clock.times)


if __name__ == "__main__":
    main()
