"""Monitored fits with two gloo processes; started as a script by test_monitor_ddp.py.

Usage: ddp_monitor.py FOLDER
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from mil_anchor import AttentionMonitor, RandomState
from tests.callbacks.ddp_fit import leave
from tests.callbacks.tiny import (
    TinyModule,
    make_batches,
    make_loader,
    make_trainer,
    seeded_module,
)

N_BAGS = 7  # the second process repeats one


class Bags(LightningDataModule):
    """Validation bags are dealt out as Lightning does."""

    def train_dataloader(self):
        # In a fixed order: Lightning repeats that of epoch 0 after a resume.
        return make_loader()

    def val_dataloader(self):
        bags = make_batches(N_BAGS, n_bags=1)
        rank = self.trainer.global_rank
        sampler = DistributedSampler(bags, num_replicas=2, rank=rank, shuffle=False)
        return DataLoader(bags, batch_size=None, sampler=sampler)


class Keeper(Callback):
    """Writes down what each process has logged last."""

    def on_fit_end(self, trainer, pl_module):
        logged = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith("attention/")
        }
        torch.save(logged, Path(trainer.default_root_dir) / f"logged{trainer.global_rank}.pt")


def fit(
    folder: Path, epochs: int, *, max_bags: int | None = None, checkpoint: Path | None = None
) -> None:
    """One fit, with a file and what each process has logged in the folder."""
    trainer = make_trainer(
        folder,
        AttentionMonitor("net.attention", max_bags=max_bags),
        RandomState(),
        ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True),
        Keeper(),
        max_epochs=epochs,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        enable_checkpointing=True,
    )
    trainer.fit(seeded_module(TinyModule), datamodule=Bags(), ckpt_path=checkpoint)


def main(folder: Path) -> None:
    fit(folder / "all", 4)
    fit(folder / "three", 4, max_bags=3)
    fit(folder / "resumed", 2, max_bags=3)
    fit(folder / "resumed", 4, max_bags=3, checkpoint=folder / "resumed" / "last.ckpt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
