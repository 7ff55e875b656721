"""MapRecorder: keeps the attention of a run's bags, tile by tile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from mil_anchor.callbacks.evaluation import EvaluationCallback
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.data.bags import bags_of
from mil_anchor.maps.file import MapWriter
from mil_anchor.sites.base import Site
from mil_anchor.sites.registry import as_site

# Entries of a batch that make something of its attention beside the numbers themselves.
_KNOWN = {"coords", "instance_label", "lesion"}


class MapRecorder(EvaluationCallback):
    """Writes the attention of bags of tiles into ``attention.h5``, for maps of it.

    Kept are bags whose instances have a place, which can be drawn, or an annotation, by which they
    can be measured.

    While a fit runs: of chosen validation bags, for every epoch. In ``trainer.validate`` and
    ``trainer.test`` outside a fit: of all bags, as that of the chosen checkpoint. Attention that is
    not found is a warning, and then there are no maps.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        path: The file.
        epochs_of: Ids of the validation bags whose attention is kept for every epoch.

    Attributes:
        epochs_of: The same; to be set before a fit.
        found: The attention that the last fit used; to be set where none has run.
        gave_up: Whether the attention could not be found or read; then nothing more is written
            until the next fit.
    """

    def __init__(
        self, site: Site | str | None = None, *, path: Path, epochs_of: Sequence[str] = ()
    ) -> None:
        super().__init__(site, strict=False)
        self.found: Site | None = None
        self.gave_up = False
        self.epochs_of = list(epochs_of)
        self.path = path
        self._writer = MapWriter(path)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gave_up = False
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self._writer.drop_epochs_from(trainer.current_epoch)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING or self.gave_up:
            return
        site = as_site(self.site) if self.site is not None else self.found
        if site is not None:
            self._recorder = AttentionRecorder(pl_module, site, only_with_grad=False)

    on_test_start = on_validation_start

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._detach()

    on_test_end = on_validation_end

    @override
    def receive(
        self, trainer: Trainer, batch: Any, of_bags: dict[str, Float[Tensor, "row instance"]]
    ) -> None:
        if _KNOWN.isdisjoint(batch) or not trainer.is_global_zero:
            return
        in_fit = trainer.state.fn == TrainerFn.FITTING
        if in_fit and not set(self.epochs_of).intersection(of_bags):
            return
        part = "test" if trainer.state.fn == TrainerFn.TESTING else "val"
        for bag in bags_of(batch):
            if in_fit and bag.bag_id not in self.epochs_of:
                continue
            self._writer.add_bag(bag, part)
            if in_fit:
                self._writer.add_epoch(bag.bag_id, trainer.current_epoch, of_bags[bag.bag_id])
            else:
                self._writer.add_best(bag.bag_id, of_bags[bag.bag_id])

    @override
    def _give_up(self, why: str) -> None:
        super()._give_up(why)
        self.gave_up = True

    @override
    def _detach(self) -> None:
        if self._recorder is not None:
            self.found = self._recorder.site
        super()._detach()
