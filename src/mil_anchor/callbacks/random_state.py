"""RandomState: makes a resumed run draw the random numbers that the uninterrupted one draws."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from mil_anchor.callbacks.processes import gather_objects, is_distributed


class RandomState(Callback):
    """Saves the random states of every process in the checkpoint, and restores them.

    Lightning's checkpoints hold no random states. With this callback a run that is stopped and
    resumed from a checkpoint written at an epoch's end equals the uninterrupted run bit for bit
    (same machine, same number of processes); an interrupted epoch is repeated.

    Raises:
        RuntimeError: The checkpoint was written by another number of processes.
    """

    def __init__(self) -> None:
        self._stage = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"processes": gather_objects(_random_states())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Evaluation from a checkpoint draws what the user's seed says, on any number of processes.
        if self._stage != "fit":
            return
        processes = state_dict["processes"]
        rank, n_processes = 0, 1
        if is_distributed():
            rank, n_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if len(processes) != n_processes:
            raise RuntimeError(
                f"A run must be resumed with as many processes as it had, {len(processes)}, but "
                f"this one has {n_processes}. Set trainer.devices accordingly."
            )
        _restore(processes[rank])


def _random_states() -> dict[str, Any]:
    # Plain numbers and tensors only: Lightning loads checkpoints with weights_only=True.
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator is meant)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()},
        },
        "python": random.getstate(),
    }


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
