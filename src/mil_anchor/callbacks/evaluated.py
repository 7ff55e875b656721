"""Which weights a model is evaluated with: those that are trained, or averages of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mil_anchor.callbacks.processes import refuse_sharding
from mil_anchor.sites.base import map_tensors

_LIGHTNINGS_OWN = "WeightAveraging"


class EvaluatedWeights(Callback, ABC):
    """Puts other weights than the trained ones into the model wherever it is evaluated.

    In a fit they are in the model from ``on_validation_start`` to ``on_validation_end``, copied in
    and out in place, and after it they stay in. So training is bit for bit as without them, and
    ``trainer.validate``, ``test`` and ``predict`` after a fit, or from one of its checkpoints, need
    nothing; a second fit without a checkpoint trains on from them. However a fit breaks off, the
    model is left with its training weights.

    A checkpoint of the Trainer holds both sets, whenever it is written: ``state_dict`` is what was
    evaluated, ``current_model_state`` what was trained and is trained on after a resume, and
    ``evaluated_weights`` names the former. A bare model loads either::

        checkpoint = torch.load("best.ckpt", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])  # or checkpoint["current_model_state"]

    Attributes:
        evaluate: The name of the weights, or ``"online"``: those that are trained.
    """

    evaluate: str
    _held: Sequence[tuple[Tensor, Tensor]] | None = None
    _resumed: Mapping[str, Any] | None = None
    _loaded: str | None = None
    _is_fitting = False

    @abstractmethod
    def replacements(self, pl_module: LightningModule) -> Sequence[tuple[Tensor, Tensor]]:
        """Tensors of the model, each with what it holds in evaluation; empty: as trained."""

    @property
    def evaluated(self) -> str:
        """The name of the weights that evaluation uses, as told by the last checkpoint loaded."""
        return self.evaluate if self._loaded is None else self._loaded

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            # No fit, or one that broke off: the model has what it trained with, or was made with.
            if self._held is None and self._loaded is None:
                self._loaded = "online"
            return
        if self.evaluate != "online":
            refuse_sharding(trainer, type(self).__name__)
            _refuse_second_answer(trainer, self)
            _refuse_bare_checkpoints(trainer, self)
        self._held = self._resumed = self._loaded = None

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._held = None
        if not self._is_fitting:
            self._loaded = checkpoint.get("evaluated_weights", "online")
        elif "current_model_state" in checkpoint:
            online = checkpoint["current_model_state"]
            pl_module.load_state_dict(online, strict=pl_module.strict_loading)
            self._resumed = checkpoint["state_dict"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only a fit that had nothing left to do ends with what its checkpoint evaluates.
        self._resumed = None
        super().on_train_start(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._put_in(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._is_fitting:
            self._take_out()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end, which a resumed fit without anything left to do never reaches.
        super().on_fit_end(trainer, pl_module)
        self._put_in(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._is_fitting = False

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._is_fitting:
            self._take_out()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.evaluate == "online":
            return
        checkpoint["evaluated_weights"] = self.evaluated
        if self._held is None and not self._pairs(pl_module):
            return
        with self._online_weights(pl_module):
            checkpoint["current_model_state"] = _copied_state(pl_module)
        with self._evaluated_weights(pl_module):
            checkpoint["state_dict"] = _copied_state(pl_module)

    def _pairs(self, pl_module: LightningModule) -> Sequence[tuple[Tensor, Tensor]]:
        if self.evaluate == "online" or self._loaded is not None:
            return []
        if self._resumed is None:
            return self.replacements(pl_module)
        own = dict((*pl_module.named_parameters(), *pl_module.named_buffers()))
        return [(own[name], self._resumed[name]) for name in own.keys() & self._resumed.keys()]

    @torch.no_grad()
    def _put_in(self, pl_module: LightningModule) -> None:
        pairs = self._pairs(pl_module)
        if self._held is not None or not pairs:
            return
        # Before the first is overwritten: Ctrl-C may come at any time, and tied weights come twice.
        self._held = [(tensor, tensor.detach().clone()) for tensor, _ in pairs]
        for tensor, replacement in pairs:
            tensor.data.copy_(replacement)

    @torch.no_grad()
    def _take_out(self) -> None:
        for tensor, online in self._held or []:
            tensor.data.copy_(online)
        self._held = None

    @contextmanager
    def _online_weights(self, pl_module: LightningModule) -> Iterator[None]:
        was_in = self._held is not None
        self._take_out()
        try:
            yield
        finally:
            if was_in:
                self._put_in(pl_module)

    @contextmanager
    def _evaluated_weights(self, pl_module: LightningModule) -> Iterator[None]:
        was_in = self._held is not None
        self._put_in(pl_module)
        try:
            yield
        finally:
            if not was_in:
                self._take_out()


def evaluated_weights(trainer: Trainer) -> str:
    """Which weights the Trainer's evaluation uses, by what its callbacks say.

    Returns:
        ``"online"`` (those that are trained), ``"slow"`` (the average of the whole model) or
        ``"anchor"`` (the attention block's alone is one). After ``trainer.test(ckpt_path=...)``:
        what that checkpoint holds.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    names = {c.evaluated for c in callbacks if isinstance(c, EvaluatedWeights)}
    if any(_is_lightnings_own(callback) for callback in callbacks):
        names.add("slow")
    return "+".join(sorted(names - {"online"})) or "online"


def _refuse_second_answer(trainer: Trainer, callback: EvaluatedWeights) -> None:
    others = [
        type(other).__name__
        for other in trainer.callbacks  # type: ignore[attr-defined]
        if other is not callback
        and (
            (isinstance(other, EvaluatedWeights) and other.evaluate != "online")
            or _is_lightnings_own(other)
        )
    ]
    if others:
        raise MisconfigurationException(
            "One callback must say which weights are evaluated, but "
            f"{type(callback).__name__} ('{callback.evaluate}') and {', '.join(others)} do. Keep "
            "one of them; an AnchorCallback(evaluate='online') may stand beside SlowWeights."
        )


def _refuse_bare_checkpoints(trainer: Trainer, callback: EvaluatedWeights) -> None:
    # Lightning asks no callback about such a checkpoint: it would hold the training weights.
    if any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
        raise MisconfigurationException(
            f"{type(callback).__name__} must put the weights it evaluates into every checkpoint, "
            "but cannot with ModelCheckpoint(save_weights_only=True). Save whole checkpoints; "
            "their 'state_dict' alone is enough to load a model."
        )


def _is_lightnings_own(callback: Callback) -> bool:
    return _LIGHTNINGS_OWN in {cls.__name__ for cls in type(callback).__mro__}


def _copied_state(module: LightningModule) -> dict[str, Any]:
    state: dict[str, Any] = map_tensors(torch.clone, dict(module.state_dict()))
    return state
