"""What all our callbacks share: they watch one attention block while a fit runs."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from mil_anchor.anchor import Anchor
from mil_anchor.callbacks.patch import TrainingPatch
from mil_anchor.callbacks.processes import gather_objects
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.callbacks.search import search
from mil_anchor.callbacks.watch import StepWatch
from mil_anchor.sites.base import RecordedAttention, Site
from mil_anchor.sites.discovery import NothingToSeeError
from mil_anchor.sites.encoder import with_encoder
from mil_anchor.sites.proof import find_difference, has_nan, is_provable
from mil_anchor.sites.registry import as_site, known_site

# Steps that may pass without attention (warm-ups, other losses) before the search gives up.
_PATIENCE = 10
_SCOPES = ("block", "encoder")


class AttentionCallback(Callback, ABC):
    """Attaches a recorder to the attention block of the module that is fitted.

    The first training step is watched: it shows the attention of an unknown model, and proves that
    the scores read are those that the model's softmax gets. The recorder is taken off again on
    every way out of a fit: its end, an exception, Ctrl-C.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        scope: What `AttentionRecorder.block` is: ``"block"``, the attention block on the online
            model's features, or ``"encoder"``, the whole model around it on the raw features.
        strict: Whether scores that no softmax of the model has got are an error or a warning.

    Raises:
        TypeError: The site is neither a site nor a path.
        ValueError: There is no such scope.
    """

    _only_with_grad: bool

    def __init__(
        self, site: Site | str | None, *, scope: str = "block", strict: bool = True
    ) -> None:
        if site is not None:
            as_site(site)  # now, and not when the fit has begun
        if scope not in _SCOPES:
            raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, but got '{scope}'.")
        self.site = site
        self.scope = scope
        self.strict = strict
        self._key: tuple[Site | str | None, str, str] | None = None
        self._recorder: AttentionRecorder | None = None
        self._guess: Site | None = None
        self._n_observed = 0
        self._n_read = 0
        self._n_proven = 0
        self._proven_sizes: set[int] = set()
        self._is_settled = False
        self._why_not_found = ""
        self._patch: TrainingPatch | None = None

    @property
    @override
    def state_key(self) -> str:
        # Lightning asks for it at every hook of every step.
        if self._key is None or self._key[:2] != (self.site, self.scope):
            site = None if self.site is None else str(as_site(self.site))
            key = self._generate_state_key(site=site, scope=self.scope)
            self._key = (self.site, self.scope, key)
        return self._key[2]

    @property
    def module(self) -> LightningModule:
        """The module that is fitted."""
        if self._patch is None:
            raise RuntimeError(f"{type(self).__name__} has a module only while trainer.fit runs.")
        return self._patch.module

    @property
    def online(self) -> AttentionRecorder:
        """The recorder on the model's own attention block; there is one while a fit runs."""
        if self._recorder is None:
            raise RuntimeError(
                f"{type(self).__name__} is attached to a model only while trainer.fit runs, from "
                "the first training step on if the attention had to be found."
            )
        return self._recorder

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        # The site is a part of the key, and may have been found then and be named now.
        own = f"{type(self).__name__}{{"
        states = checkpoint.get("callbacks", {})
        keys = [key for key in states if key.startswith(own)]
        alike = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if type(callback) is type(self)
        ]
        if self.state_key not in states and len(keys) == len(alike) == 1:
            self.load_state_dict(states[keys[0]])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.site is None:
            site, is_certain = known_site(pl_module)
        else:
            site, is_certain = as_site(self.site), True
        self._n_observed = self._n_read = self._n_proven = 0
        self._proven_sizes = set()
        self._is_settled, self._why_not_found = False, ""
        # A model of a known name may be another one: the first step tells.
        self._guess = None if is_certain else site
        self._patch = TrainingPatch.of(pl_module)
        if site is not None and is_certain:
            self._attach(site)
        self._patch.add_observer(self)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._patch is None or self._n_observed == 0 or self._is_settled:
            return
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if not last and self._n_observed < _PATIENCE:
            return
        self._is_settled = True
        if self._recorder is None:
            self._give_up(self._why_not_found)
        elif not self._n_proven:
            self._warn_unproven()
        self._patch.dismiss(self)

    def _warn_unproven(self) -> None:
        why = (
            "no bag had two instances with different scores"
            if self._n_read
            else "it did not run with gradients"
        )
        rank_zero_warn(
            f"{type(self).__name__} could not prove the scores of attention block "
            f"'{self.online.site.path}' in the first {self._n_observed} steps: {why}."
        )

    @property
    def needs_calls(self) -> bool:
        """Whether the attention must be found."""
        return self._recorder is None

    def start_watching(self) -> None:
        """Record the attention, if it is known."""
        if self._recorder is not None:
            self._recorder.start()

    def observe(self, watch: StepWatch, batch: Any, loss: Tensor) -> bool:
        """Find the attention if it is unknown, and prove it; True once that is done."""
        self._is_settled = self._observe(watch, batch, loss)
        return self._is_settled

    def _observe(self, watch: StepWatch, batch: Any, loss: Tensor) -> bool:
        self._n_observed += 1
        if self._recorder is None:
            site, error = self._agree(*self._search(watch, batch, loss))
            if site is None:
                if error is not None:
                    self._give_up(error)
                return error is not None
            self._attach(site)
            self.online.start()
            self.online.replay(watch.calls)
        return self._prove(self.online.look(batch), watch)

    def _search(self, watch: StepWatch, batch: Any, loss: Tensor) -> tuple[Site | None, str | None]:
        """The site that the step shows, or an error; neither: wait for another step."""
        name = type(self).__name__
        try:
            site = search(self.module, self._guess, watch, batch=batch, loss=loss, callback=name)
        except NothingToSeeError as error:
            self._why_not_found = str(error)
            return None, self._why_not_found if self._n_observed >= _PATIENCE else None
        except ValueError as error:
            return None, str(error)
        return site, None

    def _agree(self, site: Site | None, error: str | None) -> tuple[Site | None, str | None]:
        """One answer for all processes, whose anchors start together."""
        answers = gather_objects((site, error))
        sites = [own for own, _ in answers if own is not None]
        errors = [own for _, own in answers if own is not None]
        return (sites[0], None) if sites else (None, errors[0] if errors else None)

    def _prove(self, attention: Sequence[RecordedAttention], watch: StepWatch) -> bool:
        """Compare the scores with what the model's softmax got; True: no further step is needed."""
        site = self.online.site
        if self.scope == "encoder" and attention and not self._n_read:
            self._check_repeatable(attention)
        self._n_read += len(attention)
        if not site.must_be_proven:
            return True
        late = self._n_observed >= _PATIENCE
        if not attention:
            if late:
                self._warn_unproven()
            return late
        difference = None if has_nan(attention) else find_difference(site, attention, watch.seen)
        if difference is None:
            # One instance, or equal scores, agree with everything; and a scale may be no constant.
            if is_provable(attention):
                self._proven_sizes.add(attention[0].scores.shape[-1])
                self._n_proven += 1
            if late and not self._n_proven:
                self._warn_unproven()
            is_scaled = getattr(site, "scale", 1) not in (1, None)
            enough = len(self._proven_sizes) > 1 or self._n_proven >= (3 if is_scaled else 1)
            return enough or late
        why = (
            f"The scores of attention block '{site.path}' must be what the model's softmax gets, "
            f"but {difference}."
        )
        self._refuse(why, ", for models whose attention is no plain softmax of their scores")
        return True

    def _refuse(self, why: str, models: str = "") -> None:
        if self.strict:
            raise MisconfigurationException(
                f"{why} {type(self).__name__}(..., strict=False) makes this a warning{models}."
            )
        rank_zero_warn(why)

    def _check_repeatable(self, attention: Sequence[RecordedAttention]) -> None:
        """Run a copy of the model twice: one that shuffles would pair scores of other instances."""
        copy, site = Anchor(self.online.block), self.online.site
        for read in attention:
            one, other = copy.apply(
                lambda block, inputs: [site.rescore(block, inputs) for _ in range(2)], read.inputs
            )
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
                self._refuse(
                    f"With scope='encoder' the model around attention block '{site.path}' must "
                    "score an instance alike whenever it runs in evaluation mode, but it gave "
                    "other scores when it ran again: it draws random numbers, and perhaps the "
                    "order of the instances. Use scope='block'."
                )
                return

    def _attach(self, site: Site) -> None:
        if self.scope == "encoder":
            site = with_encoder(site, self.module)
        self._recorder = AttentionRecorder(self.module, site, only_with_grad=self._only_with_grad)

    def _give_up(self, why: str) -> None:
        """The attention is unknown and was not found."""
        raise MisconfigurationException(why)

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
        if self._patch is not None:
            self._patch.remove(self)
            self._patch = None
