"""Fits with two gloo processes that swap their bags after each epoch; started by test_temporal.py.

Usage: ddp_temporal.py FOLDER
"""

import sys

import torch
from lightning.pytorch import LightningDataModule

from mil_anchor.callbacks.temporal import TemporalEnsembleCallback
from tests.callbacks.ddp_fit import leave
from tests.callbacks.tiny import make_batches, make_loader, make_trainer, seeded_module


class SwappedBatches(LightningDataModule):
    """Every second batch for each process, the others in the next epoch."""

    def train_dataloader(self):
        turn = self.trainer.global_rank + self.trainer.current_epoch
        return make_loader(make_batches()[turn % 2 :: 2])


def main(folder: str) -> None:
    plugin = TemporalEnsembleCallback("net.attention", weight=0.7, decay=0.8)
    trainer = make_trainer(
        folder,
        plugin,
        max_epochs=3,
        precision="64-true",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
    )
    module = seeded_module(dropout=0.0)
    trainer.fit(module, datamodule=SwappedBatches())
    end = {
        "module": module.state_dict(),
        "ensembles": plugin.state_dict()["ensembles"],
        "kl": trainer.callback_metrics["temporal/kl"].item(),
    }
    torch.save(end, f"{folder}/rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
