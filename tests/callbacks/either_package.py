"""Fits a model with one of the two packages that Lightning comes as; a script, started by a test.

Usage: either_package.py PACKAGE FOLDER
"""

import importlib
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from mil_anchor import AnchorCallback, AttentionMonitor, RandomState
from tests.callbacks.tiny import TinyMIL, make_batches


def main(package: str, folder: str) -> None:
    lightning = importlib.import_module(package)
    strategies = importlib.import_module(f"{package}.strategies")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = TinyMIL()

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch["features"]), batch["label"])

        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    module, plugin = Module(), AnchorCallback(weight=0.5, decay=0.9)
    loader = DataLoader(make_batches(), batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        callbacks=[plugin, AttentionMonitor(), RandomState()],
    )
    trainer.fit(module, loader, loader)
    state = module.state_dict() | plugin.state_dict()["anchor"]
    torch.save((state, trainer.callback_metrics), Path(folder) / "result.pt")

    type(trainer).strategy = object.__new__(strategies.FSDPStrategy)
    try:
        plugin.setup(trainer, module, "fit")
    except Exception as error:  # noqa: BLE001 - the packages' classes differ
        (Path(folder) / "refusal.txt").write_text(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
