"""Fits a module with two gloo processes; started as a script by test_ddp.py.

Usage: ddp_fit.py FOLDER SUBJECT STRATEGY EPOCHS PRECISION DROPOUT [CHECKPOINT]
"""

import sys
from pathlib import Path

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from mil_anchor import AnchorCallback, AttentionMonitor, RandomState
from tests.callbacks.subjects import SUBJECTS
from tests.callbacks.tiny import make_loader, make_trainer, seeded_module

STRATEGIES = {
    "ddp": "ddp",
    "find_unused": "ddp_find_unused_parameters_true",
    "static_graph": DDPStrategy(static_graph=True),
    "spawn": "ddp_spawn",
    "late": "ddp",
}


class WithUnused:
    """Has a layer that no loss reaches."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.unused = torch.nn.Linear(2, 2)


class InstanceNorm(torch.nn.BatchNorm1d):
    """Batch norm over the instances of all bags; its statistics differ between the processes."""

    def forward(self, features):
        return super().forward(features.flatten(0, 1)).reshape(features.shape)


class OwnBatches(LightningDataModule):
    """Every second batch for this process, and random numbers of its own."""

    def __init__(self, subject: str, strategy: str, *, shuffle: bool) -> None:
        super().__init__()
        self.all_batches = make_batches(subject, strategy)
        self.shuffle = shuffle

    def setup(self, stage: str) -> None:
        torch.manual_seed(self.trainer.global_rank)
        self.batches = self.all_batches[self.trainer.global_rank :: 2]

    def train_dataloader(self):
        return make_loader(self.batches, shuffle=self.shuffle)

    def val_dataloader(self):
        return make_loader(self.batches)


class Keeper(Callback):
    """Writes down what each process ends with: spawned ones give nothing else back."""

    def __init__(self, folder: Path, plugin: AnchorCallback) -> None:
        self.folder = folder
        self.plugin = plugin

    def on_fit_end(self, trainer, pl_module):
        torch.save(
            {
                "module": pl_module.state_dict(),
                "anchor": self.plugin.state_dict()["anchor"],
                "kl": trainer.callback_metrics["anchor/kl"].item(),
                "random": torch.get_rng_state(),
            },
            self.folder / f"rank{trainer.global_rank}_after{trainer.max_epochs}.pt",
        )


def make_batches(name: str, strategy: str) -> list[dict]:
    """The batches of both processes in turn; "late": the second begins with bags of one."""
    batches = SUBJECTS[name].batches()
    if strategy == "late":
        for key in {"features", "mask"} & batches[1].keys():
            batches[1][key] = batches[1][key][:, :1]
    return batches


def make_module(name: str, strategy: str, dropout: float):
    """The module that a run starts from, for the test's own arithmetic too."""
    subject = SUBJECTS[name]
    cls = subject.variant(WithUnused) if strategy == "find_unused" else subject.module
    module = seeded_module(cls, dropout=dropout)
    if dropout > 0 and name == "tiny":
        module.net.attention.insert(1, InstanceNorm(6))
    return module


def main(
    folder: str,
    name: str,
    strategy: str,
    epochs: str,
    precision: str,
    dropout: str,
    checkpoint: str | None = None,
) -> None:
    # Of the one subject the attention is known, of the other it has to be found.
    plugin = AnchorCallback(weight=0.7, decay=0.8)
    trainer = make_trainer(
        folder,
        plugin,
        AttentionMonitor(),
        RandomState(),
        ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True),
        Keeper(Path(folder), plugin),
        max_epochs=int(epochs),
        precision=precision,
        devices=2,
        strategy=STRATEGIES[strategy],
        use_distributed_sampler=False,
        enable_checkpointing=True,
    )
    module = make_module(name, strategy, float(dropout))
    data = OwnBatches(name, strategy, shuffle=float(dropout) > 0)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)


def leave() -> None:
    """End the process group: left alone, gloo's threads may abort the interpreter as it ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
