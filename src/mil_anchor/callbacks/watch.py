"""Watches everything that a training step runs: for discovery and proof."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType

import torch
from torch import nn

from mil_anchor.callbacks.recorder import CallRecorder
from mil_anchor.sites.base import ModuleCall
from mil_anchor.sites.normalizations import Normalization, NormalizationWatch

# A scorer's output has a few rows for each instance: wide outputs need no copy, which is memory.
_NARROW = 4


class StepWatch:
    """Records, while it is entered, every normalisation, and every submodule's calls if asked to.

    Compiled parts run eagerly meanwhile: a fused kernel shows nothing, and what is compiled later
    is compiled without these hooks.

    Args:
        root: The module to watch; calls are named by paths from it.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._recorder: CallRecorder | None = None
        self._normalizations = NormalizationWatch()
        self._stack = ExitStack()

    def watch_calls(self) -> None:
        """Record the calls of every submodule as well."""
        if self._recorder is None:
            watched = {
                path: module
                for path, module in self._root.named_modules()
                if path and not isinstance(module, torch.jit.ScriptModule)
            }
            self._recorder = CallRecorder(watched, only_with_grad=True, narrow=_NARROW)

    @property
    def calls(self) -> Sequence[ModuleCall]:
        """Every submodule's calls with gradients, in the order of their return."""
        return [] if self._recorder is None else self._recorder.calls

    @property
    def seen(self) -> Sequence[Normalization]:
        """What the step has normalised."""
        return self._normalizations.seen

    def __enter__(self) -> None:
        if self._recorder is not None:
            self._recorder.start()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(self._normalizations)
        self._normalizations.active = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._recorder is not None:
            self._recorder.stop()
        self._normalizations.stop()
        self._stack.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing: what runs now is not the model's, or has run before."""
        self._normalizations.active = False
        try:
            with nullcontext() if self._recorder is None else self._recorder.paused():
                yield
        finally:
            self._normalizations.active = True

    def remove(self) -> None:
        """Take the hooks off the model."""
        if self._recorder is not None:
            self._recorder.remove()
