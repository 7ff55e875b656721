"""The mechanism of every plug-in: a penalty on the attention of each training step."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mil_anchor.callbacks.base import AttentionCallback
from mil_anchor.callbacks.patch import TrainingPatch
from mil_anchor.callbacks.processes import refuse_sharding, weighted_mean
from mil_anchor.callbacks.recorder import batch_entry
from mil_anchor.callbacks.uniform import UniformWatch
from mil_anchor.schedules import Constant, Schedule, as_schedule
from mil_anchor.sites.base import RecordedAttention, Site


class AttentionRegularizer(AttentionCallback):
    """Adds ``weight x schedule x mean penalty`` to the training loss of an unmodified model.

    A subclass says what the penalty of one recorded call of the attention block is. During a
    training step the block's calls are recorded by a hook; after the step the penalty, averaged
    over calls, bags and rows, joins the loss that ``training_step`` returns (a tensor or a
    mapping with "loss") or, with manual optimization, the loss given to the first
    ``manual_backward`` after the block has run (with several losses, pass the one that uses the
    block first: backward frees the graph that the penalty shares with it). The
    module is as before when fit ends, however it ends. A weight of 0 only measures.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        weight: Coefficient of the penalty, at least 0.
        schedule: What the weight is multiplied by as the training goes on: ``"constant"``,
            ``"ramp"`` (0 up to 20 % of the training, 1 from 60 % on), ``"linear"`` and
            ``"cosine"`` (1 to 0), or a `Schedule`.
        scope: ``"block"``: the attention block alone; ``"encoder"``: the whole model around it.
        strict: Whether scores that no softmax of the model has got are an error or a warning.

    Raises:
        ValueError: The weight is negative or not finite, or a name is unknown.

    Example:
        A penalty on the largest attention weight, as a plug-in of its own::

            class Ceiling(AttentionRegularizer):
                def penalty(self, attention):
                    return softmax(attention.scores, attention.mask).amax(dim=-1)

                def log_values(self, penalty):
                    return {"ceiling/largest": penalty}
    """

    _only_with_grad = True

    def __init__(
        self,
        site: Site | str | None = None,
        *,
        weight: float,
        schedule: Schedule | str = "constant",
        scope: str = "block",
        strict: bool = True,
    ) -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"weight must be a finite number of at least 0, but got {weight}. Use 0 to measure "
                "without changing the training."
            )
        super().__init__(site, scope=scope, strict=strict)
        self.weight = weight
        self.schedule = as_schedule(schedule)
        self._uniform = UniformWatch("training")
        self._batch: Any = None
        self._batch_idx = 0
        self._values: list[Tensor] = []
        self._n_values: list[int] = []
        self._weights: list[float] = []

    @abstractmethod
    def penalty(self, attention: RecordedAttention) -> Float[Tensor, "bag row"]:
        """The penalty of each bag and row for one call of the attention block."""

    @abstractmethod
    def log_values(self, penalty: Tensor) -> dict[str, Tensor]:
        """What to log at the end of an epoch, given the epoch's mean penalty."""

    @property
    def progress(self) -> float:
        """How much of the fit is over, in [0, 1], by ``max_epochs`` and ``max_steps``.

        Raises:
            MisconfigurationException: The Trainer has neither.
        """
        trainer = self.module.trainer
        shares = []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            n_batches = trainer.num_training_batches
            of_epoch = self._batch_idx / n_batches if 0 < n_batches < math.inf else 0.0
            shares.append((trainer.current_epoch + of_epoch) / trainer.max_epochs)
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if not shares:
            raise MisconfigurationException(
                f"{type(self).__name__} follows {self.schedule} over the training, whose length "
                "the Trainer must know, but it has neither max_epochs nor max_steps. Set one, or "
                "schedule='constant'."
            )
        return min(1.0, max(shares))

    @property
    def current_weight(self) -> float:
        """The coefficient of the penalty in this step: the weight times the schedule's factor."""
        if isinstance(self.schedule, Constant):
            return self.weight
        return self.weight * self.schedule(self.progress)

    @property
    def mean_weight(self) -> float:
        """The coefficient of the penalty, mean over the steps of this epoch so far."""
        return fmean(self._weights) if self._weights else self.current_weight

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_sharding(trainer, type(self).__name__)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        TrainingPatch.of(pl_module).add_term(self)
        self._uniform.start(trainer)
        self._batch_idx = 0
        _ = self.current_weight  # now, and not in the first step: the schedule must be defined

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = batch_idx

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._uniform.end_epoch(trainer)
        if not self._values:
            # Automatic optimization has raised in the first step, unless every step was skipped.
            if not pl_module.automatic_optimization:
                raise MisconfigurationException(self.describe_missing())
            return
        mean = weighted_mean(self._values, self._n_values)
        suffix = self._log_suffix(trainer)
        values = self.log_values(mean)
        self._forget_epoch()
        pl_module.log_dict({f"{key}{suffix}": value for key, value in values.items()})

    def start_step(self, batch: Any) -> None:
        """Record from here on."""
        self._batch = batch
        if self._recorder is not None:
            self._recorder.start()

    def take_term(self) -> Tensor | None:
        """The weighted penalty of the calls recorded so far; None for weight 0."""
        weight = self.current_weight
        # At weight 0 nothing enters the loss, not even a zero: training is bit for bit as without.
        with torch.set_grad_enabled(weight > 0):
            try:
                calls = self.online.take(self._batch)
                each = [self.penalty(call).flatten() for call in calls]
            except ValueError as error:
                ids = batch_entry(self._batch, "bag_id")
                where = "" if ids is None else f"In the batch of bags {ids}: "
                raise ValueError(f"{where}{error}") from error
            penalties = each[0] if len(each) == 1 else torch.cat(each)
            mean = penalties.mean()
        for call in calls:
            self._uniform.add(call.scores, call.mask)
        self._values.append(mean.detach())
        self._n_values.append(len(penalties))
        self._weights.append(weight)
        return weight * mean if weight > 0 else None

    def end_step(self) -> None:
        """Drop what the step left behind, graph included."""
        self._batch = None
        if self._recorder is not None:
            self._recorder.stop()

    def describe_missing(self) -> str:
        """Why a training step may have given no scores."""
        if self._recorder is None:
            return (
                f"{type(self).__name__} must find the attention of the model in the first training "
                "step, but no step has run one over two instances with gradients. Name the block, "
                f"as in {type(self).__name__}('attention')."
            )
        return (
            f"{type(self).__name__} must see the attention block '{self.online.site.path}' run "
            "with gradients in every training step, but it did not. Check that the path names the "
            "block in use, that training_step calls it as a module (not its forward), that it does "
            "not run under no_grad or reentrant checkpointing, and that the model was not compiled "
            "and run before fit (torch._dynamo.reset() cures that)."
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing: what runs now has run before."""
        with nullcontext() if self._recorder is None else self._recorder.paused():
            yield

    @property
    def has_recorded(self) -> bool:
        """Whether the block has run since the last term was taken."""
        return self._recorder is not None and bool(self._recorder.calls)

    @property
    def is_searching(self) -> bool:
        """Whether the attention has not been found yet."""
        return self._recorder is None

    @override
    def _detach(self) -> None:
        super()._detach()
        self._batch = None
        self._forget_epoch()

    def _log_suffix(self, trainer: Trainer) -> str:
        """What tells apart the log keys of several plug-ins of this kind: blocks, then places."""
        alike = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if type(other) is type(self)
        ]
        if len(alike) == 1:
            return ""
        path = self.online.site.path
        found = [other for other in alike if not other.is_searching]
        twins = [other for other in found if other.online.site.path == path]
        return f"/{path}" if len(twins) == 1 else f"/{path}/{twins.index(self)}"

    def _forget_epoch(self) -> None:
        self._values, self._n_values, self._weights = [], [], []
