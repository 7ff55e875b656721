"""What all our callbacks share: they watch one attention block while a fit runs."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from mil_anchor.callbacks.patch import TrainingPatch
from mil_anchor.callbacks.recorder import AttentionRecorder, n_bags_of
from mil_anchor.callbacks.watch import StepWatch
from mil_anchor.sites.base import RecordedAttention, Site
from mil_anchor.sites.discovery import discover
from mil_anchor.sites.proof import find_difference, is_provable
from mil_anchor.sites.registry import as_site, known_site


class AttentionCallback(Callback, ABC):
    """Attaches a recorder to the attention block of the module that is fitted.

    The first training step is watched: it shows the attention of an unknown model, and proves that
    the scores read are those that the model's softmax gets. The recorder is taken off again on
    every way out of a fit: its end, an exception, Ctrl-C.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        strict: Whether scores that no softmax of the model has got are an error or a warning.
    """

    _only_with_grad: bool

    def __init__(self, site: Site | str | None, *, strict: bool = True) -> None:
        if site is not None:
            as_site(site)  # now, and not when the fit has begun
        self.site = site
        self.strict = strict
        self._recorder: AttentionRecorder | None = None
        self._guess: Site | None = None
        self._patch: TrainingPatch | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(site=str(self.site))

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
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.site is None:
            site, is_certain = known_site(pl_module)
        else:
            site, is_certain = as_site(self.site), True
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
        if self._recorder is None:
            try:
                site = self._search(watch, batch, loss)
            except ValueError as error:
                self._give_up(str(error))
                return True
            if site is None:
                return False
            self._attach(site)
            self.online.start()
            self.online.replay(watch.calls)
        attention = self.online.look(batch)
        if not is_provable(attention):
            return False
        self._prove(self.online.site, attention, watch)
        return True

    def _search(self, watch: StepWatch, batch: Any, loss: Tensor) -> Site | None:
        """The site that the step shows; None: it shows no attention, so wait for another.

        Raises:
            ValueError: What the step shows is not clear.
        """
        fits, is_readable = self._try_guess(watch, batch)
        if fits:
            return self._guess
        name = type(self).__name__
        try:
            site = discover(
                self.module,
                watch.calls,
                watch.seen,
                loss=loss,
                n_bags=n_bags_of(batch),
                callback=name,
            )
        except ValueError:
            if is_readable:  # the proof tells better what is wrong with it
                return self._guess
            # The attention of one instance: nothing can be seen there.
            if any(softmax.scores.shape[-1] == 1 for softmax in watch.seen):
                return None
            raise
        rank_zero_info(
            f"{name}: found the attention of {type(self.module).__name__} in '{site.path}'. "
            f"To name it: {name}({site})."
        )
        return site

    def _try_guess(self, watch: StepWatch, batch: Any) -> tuple[bool, bool]:
        """Whether the site of the model's name fits what the step has run; whether it reads."""
        if self._guess is None:
            return False, False
        recorder = AttentionRecorder(self.module, self._guess, only_with_grad=True)
        try:
            recorder.replay(watch.calls)
            attention = recorder.look(batch)
        except (ValueError, RuntimeError):
            return False, False
        finally:
            recorder.remove()
        is_readable = is_provable(attention) and any(
            parameter.requires_grad for parameter in recorder.block.parameters()
        )
        fits = is_readable and (
            not recorder.site.must_be_proven
            or find_difference(recorder.site, attention, watch.seen) is None
        )
        return fits, is_readable

    def _prove(self, site: Site, attention: Sequence[RecordedAttention], watch: StepWatch) -> None:
        difference = find_difference(site, attention, watch.seen)
        if difference is None or not site.must_be_proven:
            return
        why = (
            f"The scores of attention block '{site.path}' must be what the model's softmax gets, "
            f"but {difference}."
        )
        if self.strict:
            raise MisconfigurationException(
                f"{why} {type(self).__name__}(..., strict=False) makes this a warning, for models "
                "whose attention is no plain softmax of their scores."
            )
        rank_zero_warn(why)

    def _attach(self, site: Site) -> None:
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
