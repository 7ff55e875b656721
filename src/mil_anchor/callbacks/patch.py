"""The one place where a LightningModule's training step is wrapped."""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from mil_anchor.callbacks.watch import StepWatch

_NOT_SET = object()


@runtime_checkable
class LossTerm(Protocol):
    """What adds a term to the training loss."""

    def start_step(self, batch: Any) -> None:
        """The training step begins."""

    def take_term(self) -> Tensor | None:
        """The weighted term for what has run since the last time, None if there is none."""

    def end_step(self) -> None:
        """The training step is over, by return or by exception: keep nothing of it."""

    def paused(self) -> AbstractContextManager[None]:
        """Record nothing while the context is open."""

    def describe_missing(self) -> str:
        """What to tell the user when a whole training step gave no term."""

    @property
    def has_recorded(self) -> bool:
        """Whether something has run since the last term was taken."""

    @property
    def is_searching(self) -> bool:
        """Whether it is not known yet what must run."""


@runtime_checkable
class StepObserver(Protocol):
    """What looks at everything that the first training steps run."""

    @property
    def needs_calls(self) -> bool:
        """Whether it must see the calls of every submodule."""

    def start_watching(self) -> None:
        """A step that is watched begins."""

    def observe(self, watch: StepWatch, batch: Any, loss: Tensor) -> bool:
        """Look at a step that has given this loss; True: enough seen."""


class TrainingPatch:
    """Wraps ``training_step`` and ``manual_backward`` on one module instance.

    One patch serves all plug-ins on a module; they leave in any order, and the last one puts back
    exactly what the instance held. Copies and pickles of the module have the plain methods.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self._terms: list[LossTerm] = []
        self._observers: list[StepObserver] = []
        self._watch: StepWatch | None = None
        self._batch: Any = None
        self._taken: set[int] = set()
        self._called_manual_backward = False
        self._methods = [
            _PatchedMethod(module, "training_step", self._training_step, self),
            _PatchedMethod(module, "manual_backward", self._manual_backward, self),
        ]

    @classmethod
    def of(cls, module: LightningModule) -> "TrainingPatch":
        """The module's patch, made if it has none."""
        method = vars(module).get("training_step")
        return method.patch if isinstance(method, _PatchedMethod) else cls(module)

    def add_term(self, term: LossTerm) -> None:
        """Let a term take part in the module's training steps."""
        self._terms.append(term)

    def add_observer(self, observer: StepObserver) -> None:
        """Let an observer look at training steps until it has seen enough."""
        self._observers.append(observer)
        if self._watch is None:
            # Now, and not in the step: a model that is compiled has its hooks before that.
            self._watch = StepWatch(self.module)
        if observer.needs_calls:
            self._watch.watch_calls()

    def remove(self, member: object) -> None:
        """Let a term or an observer, or what is both, go; the last one restores the module."""
        self._terms = [kept for kept in self._terms if kept is not member]
        self.dismiss(member)

    def dismiss(self, observer: object) -> None:
        """Let an observer go that has seen enough."""
        self._observers = [kept for kept in self._observers if kept is not observer]
        if not self._observers and self._watch is not None:
            self._watch.remove()
            self._watch = None
        if not self._terms and not self._observers:
            for method in self._methods:
                method.restore()

    def _training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A validation step may call the training step.
        if not self.module.trainer.training:
            return step(*args, **kwargs)
        self._batch = next(iter((*args, *kwargs.values())), None)
        self._taken.clear()
        self._called_manual_backward = False
        for observer in self._observers:
            observer.start_watching()
        for term in self._terms:
            term.start_step(self._batch)
        try:
            with self._watch or nullcontext():
                result = step(*args, **kwargs)
                if self.module.automatic_optimization:
                    return self._add_terms_to_result(result)
                self._check_manual_step()
                return result
        finally:
            self._batch = None
            for term in self._terms:
                term.end_step()

    def _manual_backward(
        self, backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        self._called_manual_backward = True
        self._let_observe(loss)
        for term in self._terms:
            if term.has_recorded:
                loss = _plus(loss, term.take_term())
                self._taken.add(id(term))
        with ExitStack() as stack:
            # Checkpointed parts run again in there.
            for term in self._terms:
                stack.enter_context(term.paused())
            if self._watch is not None:
                stack.enter_context(self._watch.paused())
            backward(loss, *args, **kwargs)

    def _add_terms_to_result(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return self._plus_terms(result)
        if isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor):
            return {**result, "loss": self._plus_terms(result["loss"])}
        return result  # None skips the step; anything else is Lightning's to refuse

    def _plus_terms(self, loss: Tensor) -> Tensor:
        self._let_observe(loss)
        for term in self._terms:
            if term.has_recorded:
                loss = _plus(loss, term.take_term())
            elif not term.is_searching:
                raise MisconfigurationException(term.describe_missing())
        return loss

    def _let_observe(self, loss: Tensor) -> None:
        if self._watch is None:
            return
        watch = self._watch
        with watch.paused():
            for observer in list(self._observers):
                if observer.observe(watch, self._batch, loss):
                    self.dismiss(observer)

    def _check_manual_step(self) -> None:
        for term in self._terms:
            if id(term) in self._taken:
                continue
            bypassed = not self._called_manual_backward and bool(self._watch and self._watch.calls)
            if term.has_recorded or (term.is_searching and bypassed):
                raise MisconfigurationException(
                    "With manual optimization the loss must go through self.manual_backward(loss) "
                    "so that a plug-in can add its term, but this training step ran the model "
                    "without it. Replace loss.backward()."
                )
            if self._called_manual_backward and not term.is_searching:
                raise MisconfigurationException(term.describe_missing())


class _PatchedMethod:
    """Stands in for a bound method in the instance's ``__dict__``."""

    def __init__(
        self,
        module: LightningModule,
        name: str,
        replacement: Callable[..., Any],
        patch: TrainingPatch,
    ) -> None:
        self.patch = patch
        self._module = module
        self._name = name
        self._replacement = replacement
        self._held = vars(module).get(name, _NOT_SET)
        self._inner = getattr(module, name)
        functools.update_wrapper(self, self._inner, updated=())
        # Lightning unwraps one level when it looks at a hook's signature.
        self.__wrapped__ = inspect.unwrap(self._inner)
        vars(module)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._replacement(self._inner, *args, **kwargs)

    def restore(self) -> None:
        # Something else may have been wrapped around us since: then we stay, without effect.
        if vars(self._module).get(self._name) is not self:
            return
        if self._held is _NOT_SET:
            del vars(self._module)[self._name]
        else:
            vars(self._module)[self._name] = self._held

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # deepcopy and pickle of the module in mid-fit give the copy its own plain method: both
        # bind a bound method to the copy of its object.
        return _itself, (self._inner,)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def _plus(loss: Tensor, term: Tensor | None) -> Tensor:
    return loss if term is None else loss + term
