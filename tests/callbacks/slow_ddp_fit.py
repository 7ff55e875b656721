"""Fits a module with slow weights in two gloo processes; started as a script by test_slow.py.

Usage: slow_ddp_fit.py FOLDER EPOCHS [CHECKPOINT]
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from mil_anchor import RandomState
from mil_anchor.callbacks.slow import SlowWeights
from tests.callbacks.ddp_fit import OwnBatches, leave
from tests.callbacks.tiny import TinyModule, make_trainer, parameters_of, seeded_module


class WithBatchNorm(TinyModule):
    """Its running statistics differ between the processes."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.norm = torch.nn.BatchNorm1d(4)

    def loss(self, batch):
        features = self.norm(batch["features"].flatten(0, 1)).reshape(batch["features"].shape)
        return super().loss({**batch, "features": features})


class Keeper(Callback):
    """Writes down what each process ends with."""

    def __init__(self, folder: Path, slow: SlowWeights) -> None:
        self.folder, self.slow = folder, slow

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated = parameters_of(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.online = parameters_of(pl_module)

    def on_fit_end(self, trainer, pl_module):
        torch.save(
            {
                "module": pl_module.state_dict(),
                "slow": self.slow.state_dict()["slow"],
                "validated": self.validated,
                "online": self.online,
            },
            self.folder / f"rank{trainer.global_rank}_after{trainer.max_epochs}.pt",
        )


def main(folder: str, epochs: str, checkpoint: str | None = None) -> None:
    slow = SlowWeights(decay=0.8)
    trainer = make_trainer(
        folder,
        slow,
        RandomState(),
        ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True),
        Keeper(Path(folder), slow),
        max_epochs=int(epochs),
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        enable_checkpointing=True,
    )
    module = seeded_module(WithBatchNorm)
    data = OwnBatches("tiny", "ddp", shuffle=True)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
