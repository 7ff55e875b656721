"""Times the steps of a fit, for the benchmarks of training steps."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class _Clock(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.process_time()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def step_seconds(
    module: LightningModule, loader: Iterable[Any], callbacks: Sequence[Callback]
) -> list[float]:
    """CPU seconds of each step of an epoch on the CPU, with the seed 0."""
    clock = _Clock()
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, clock],
    )
    trainer.fit(module, loader)
    return clock.seconds
