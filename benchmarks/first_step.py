"""Does finding and proving the attention cost anything after the first training step?

Fits one model five ways, interleaved: bare (twice, as a control), and with the plug-in, without its
search and proof, or with a named block that is proven, or with one that is found and proven.
Process CPU time of one thread; minima over rounds. Run: python -m benchmarks.first_step
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.table import Table
from torch import nn
from typing_extensions import override

from benchmarks.fitting import SteppedFit
from benchmarks.record import arguments, show, start, write
from benchmarks.timing import CLOCKS, again
from mil_anchor import AnchorCallback, AttentionSite
from mil_anchor.callbacks.patch import TrainingPatch

SITE = AttentionSite("scorer", layout="b n r")


class Bags(LightningModule):
    """Textbook ABMIL, of a class that no registry knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 512), nn.ReLU())
        self.scorer = nn.Sequential(nn.Linear(512, 128), nn.Tanh(), nn.Linear(128, 1))
        self.head = nn.Linear(512, 2)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        hidden = self.encoder(batch[0])
        attention = self.scorer(hidden).softmax(dim=1)
        logits = self.head((attention * hidden).sum(dim=1))
        return nn.functional.cross_entropy(logits, batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Unwatched(AnchorCallback):
    """The plug-in without the first step's search and proof."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        TrainingPatch.of(pl_module).dismiss(self)


BARE = "bare"
VARIANTS: dict[str, Any] = {
    BARE: list,
    again(BARE): list,
    "plug-in, neither": lambda: [Unwatched(SITE)],
    "plug-in, proven": lambda: [AnchorCallback(SITE)],
    "plug-in, found": lambda: [AnchorCallback()],
}


def main() -> None:
    """Time the variants and print a table."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--instances", type=int, default=2000)
    parser.add_argument("--width", type=int, default=1024)
    chosen = start(parser)
    features, label = torch.randn(1, chosen.instances, chosen.width), torch.tensor([1])
    bag = features.to(chosen.device), label.to(chosen.device)
    first: dict[str, list[float]] = {name: [] for name in VARIANTS}
    later: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for index in range(chosen.rounds):
        for name in list(VARIANTS)[:: 1 if index % 2 else -1]:
            torch.manual_seed(0)
            plugins = VARIANTS[name]()
            with SteppedFit(
                Bags(chosen.width), bag, callbacks=plugins, device=chosen.device
            ) as fit:
                seconds = [CLOCKS[chosen.device](fit.step) for _ in range(chosen.steps)]
            first[name].append(seconds[0])
            later[name].append(min(seconds[2:]))
    table = Table("variant", "first step (ms)", "later steps (ms)", f"later / {BARE}")
    ratios: dict[str, dict[str, float]] = {}
    reference = min(later[BARE])
    for name in VARIANTS:
        ratios[name] = {
            "ratio": min(later[name]) / reference,
            "control": min(later[again(BARE)]) / reference,
            "first_milliseconds": 1000 * min(first[name]),
            "milliseconds": 1000 * min(later[name]),
        }
        figures = ("first_milliseconds", "milliseconds", "ratio")
        table.add_row(name, *(f"{ratios[name][figure]:.3g}" for figure in figures))
    show(table)
    write("first_step", ratios, chosen, instances=chosen.instances, width=chosen.width)


if __name__ == "__main__":
    main()
