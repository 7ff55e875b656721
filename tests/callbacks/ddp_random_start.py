"""Fits with a random anchor in two gloo processes; started as a script by test_anchor_options.py.

Usage: ddp_random_start.py FOLDER
"""

import sys
from pathlib import Path

from mil_anchor import AnchorCallback
from tests.callbacks.ddp_fit import Keeper, OwnBatches, leave, make_module
from tests.callbacks.tiny import make_trainer


def main(folder: str) -> None:
    plugin = AnchorCallback("net.attention", weight=0.7, start="random", update="never")
    trainer = make_trainer(
        folder,
        plugin,
        Keeper(Path(folder), plugin),
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
    )
    # The data seed each process apart, before the anchor is drawn.
    trainer.fit(make_module("tiny", "ddp", 0.3), datamodule=OwnBatches("tiny", "ddp", shuffle=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
