"""What all our callbacks share: they watch one attention block while a fit runs."""

from abc import ABC
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from mil_anchor.callbacks.patch import TrainingPatch
from mil_anchor.callbacks.recorder import AttentionRecorder, n_bags_of
from mil_anchor.callbacks.watch import StepWatch
from mil_anchor.sites.base import Site
from mil_anchor.sites.discovery import discover, shows_instances
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
        self._patch = TrainingPatch.of(pl_module)
        self._patch.add_observer(self)
        site = known_site(pl_module) if self.site is None else as_site(self.site)
        if site is not None:
            self._attach(site)

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

    def observe(self, watch: StepWatch, batch: Any, loss: Tensor) -> bool:
        """Find the attention if it is unknown, and prove it; True once that is done."""
        if self._recorder is None:
            # A bag of one instance shows no attention: wait for another.
            return shows_instances(watch.calls) and self._find(watch, batch, loss)
        if not self._recorder.calls:
            self._recorder.replay(watch.calls)
        attention = self._recorder.look(batch)
        if not is_provable(attention):
            return False
        site = self._recorder.site
        difference = find_difference(site, attention, watch.seen)
        if difference is None or not site.must_be_proven:
            return True
        why = f"The scores of attention block '{site.path}' must be what the model's softmax gets"
        # A model of a known name may be another one: then what it runs decides.
        if self.site is None and self._find(watch, batch, loss, or_else=False):
            return True
        if self.strict:
            raise MisconfigurationException(
                f"{why}, but {difference}. {type(self).__name__}(..., strict=False) makes this a "
                "warning, for models whose attention is no plain softmax of their scores."
            )
        rank_zero_warn(f"{why}, but {difference}.")
        return True

    def _find(self, watch: StepWatch, batch: Any, loss: Tensor, *, or_else: bool = True) -> bool:
        """Look for the attention in what the step has run; False: it is not there."""
        n_bags = n_bags_of(batch)
        try:
            site = discover(self.module, watch.calls, watch.seen, loss=loss, n_bags=n_bags)
        except ValueError as error:
            if or_else:
                self._give_up(str(error))
            return or_else
        self._attach(site)
        self.online.start()
        self.online.replay(watch.calls)
        rank_zero_info(
            f"{type(self).__name__}: found the attention of {type(self.module).__name__} in "
            f"'{site.path}'. To name it: {type(self).__name__}({site})."
        )
        return True

    def _attach(self, site: Site) -> None:
        if self._recorder is not None:
            self._recorder.remove()
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
