"""Fits the tiny model with two gloo processes; started as a script by test_ddp.py.

Usage: ddp_fit.py FOLDER EPOCHS PRECISION DROPOUT [CHECKPOINT]
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mil_anchor import AnchorCallback, AttentionMonitor, RandomState
from tests.callbacks.tiny import make_batches, make_loader, make_trainer, seeded_module


class InstanceNorm(torch.nn.BatchNorm1d):
    """Batch norm over the instances of all bags."""

    def forward(self, features):
        return super().forward(features.flatten(0, 1)).reshape(features.shape)


def main(folder: Path, epochs: int, precision: str, dropout: float, checkpoint: str | None) -> None:
    module = seeded_module(dropout=dropout)
    if dropout > 0:
        # Its statistics differ between the processes.
        module.net.attention.insert(1, InstanceNorm(6))
    callback = AnchorCallback("net.attention", weight=0.7, decay=0.8)
    monitor = AttentionMonitor("net.attention")
    keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = make_trainer(
        folder,
        callback,
        monitor,
        RandomState(),
        keeper,
        max_epochs=epochs,
        precision=precision,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        enable_checkpointing=True,
    )
    torch.manual_seed(trainer.global_rank)
    batches = make_batches()[trainer.global_rank :: 2]
    loader = make_loader(batches, shuffle=dropout > 0)
    trainer.fit(module, loader, make_loader(batches), ckpt_path=checkpoint)
    torch.save(
        {
            "module": module.state_dict(),
            "anchor": callback.state_dict()["anchor"],
            "kl": trainer.callback_metrics["anchor/kl"].item(),
            "random": torch.get_rng_state(),
        },
        folder / f"rank{trainer.global_rank}_after{epochs}.pt",
    )


if __name__ == "__main__":
    folder, epochs, precision, dropout, *checkpoint = sys.argv[1:]
    main(Path(folder), int(epochs), precision, float(dropout), *(checkpoint or [None]))
