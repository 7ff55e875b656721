"""Runs the steps of a Trainer one by one, so that steps of several fits can be timed in turn."""

import ctypes
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

_M_ARENA_MAX = -8
# More than anybody times.
_N_STEPS = 1_000_000


class SteppedFit:
    """A ``Trainer.fit`` that stands still between its training steps.

    It runs in a thread of its own, and that thread and the caller's pass one baton: only one of
    them ever runs. A step is a whole turn of the Trainer's loop, with the loading of its batch.
    Use it as a context; leaving it ends the fit, and an error inside the fit is raised here.

    Args:
        module: The module to train, its weights drawn by the caller.
        batch: What every step trains on.
        callbacks: Callbacks of the Trainer.
        device: ``"cpu"`` or ``"cuda"``.
        precision: The Trainer's.
    """

    def __init__(
        self,
        module: LightningModule,
        batch: Any,
        *,
        callbacks: Sequence[Callback] = (),
        device: str = "cpu",
        precision: Any = "32-true",
    ) -> None:
        self._trainer = Trainer(
            max_epochs=1,
            precision=precision,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, _Pause(self)],
        )
        self._module = module
        self._loader = DataLoader(_Repeated(batch), batch_size=None)
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._error: BaseException | None = None
        self._is_closing = False
        self._is_over = False

    def __enter__(self) -> "SteppedFit":
        # Each thread would get a memory arena of its own, and large tensors fresh pages every time:
        # what runs in one thread everywhere else must find the same memory here.
        getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(_M_ARENA_MAX, 1)
        self._thread.start()
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def step(self) -> None:
        """Run one training step; raises what the fit raises."""
        self._go.release()
        self._wait()

    def close(self) -> None:
        """End the fit, after the step that it may be in."""
        self._is_closing = True
        self._go.release()
        self._thread.join()

    def pause(self) -> None:
        """Wait for the next `step`; called in the fit's thread, before each training step."""
        self._back.release()
        self._go.acquire()
        if self._is_closing:
            raise _ClosedError

    def _fit(self) -> None:
        # OpenMP counts threads per thread.
        torch.set_num_threads(1)
        try:
            self._trainer.fit(self._module, self._loader)
        except _ClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            self._error = error
        self._is_over = True
        self._back.release()

    def _wait(self) -> None:
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._is_over:
            raise RuntimeError("A stepped fit must stay in its loop, but this one has ended.")


class _ClosedError(Exception):
    """Ends a fit; the plug-ins put everything back as after any other exception."""


class _Pause(Callback):
    def __init__(self, fit: SteppedFit) -> None:
        self._fit = fit

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._fit.pause()


class _Repeated(Dataset[Any]):
    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return _N_STEPS

    @override
    def __getitem__(self, index: int) -> Any:
        return self._batch
