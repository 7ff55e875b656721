"""What our callbacks share that look at the attention of evaluated bags."""

from abc import abstractmethod
from typing import Any

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from mil_anchor.callbacks.base import AttentionCallback
from mil_anchor.callbacks.watch import StepWatch


class EvaluationCallback(AttentionCallback):
    """Records the attention of each bag that is validated or tested, without a forward of its own.

    In a fit it is attached from the first training step on; a subclass may attach it elsewhere.
    Attention that cannot be read is an error if ``strict``, and else a warning, and the end of it.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        strict: Whether attention that is not found, or scores that no softmax of the model has got,
            are an error or a warning.
    """

    _only_with_grad = False

    @abstractmethod
    def receive(
        self, trainer: Trainer, batch: Any, of_bags: dict[str, Float[Tensor, "row instance"]]
    ) -> None:
        """Take the log-attention of the bags of one batch, by bag id, real instances only.

        Raises:
            ValueError: It is not the attention of these bags.
        """

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._recorder is not None:
            self._recorder.start()

    on_test_batch_start = on_validation_batch_start

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._recorder is None:
            return
        try:
            of_bags = self._recorder.take_by_bag(batch, f"{dataloader_idx}:{batch_idx}")
            self.receive(trainer, batch, of_bags)
        except ValueError as error:
            self._give_up(str(error))
            self._detach()

    on_test_batch_end = on_validation_batch_end

    @override
    def observe(self, watch: StepWatch, batch: Any, loss: Tensor) -> bool:
        done = super().observe(watch, batch, loss)
        if self._recorder is not None:
            self._recorder.stop()
        return done

    @override
    def _give_up(self, why: str) -> None:
        if self.strict:
            super()._give_up(why)
        # In the same words for all callbacks of a run, so that Python shows it once.
        rank_zero_warn(f"The attention of evaluated bags is not recorded: {why}")
