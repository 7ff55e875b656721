"""StepCost: counts what one training step and one inference cost."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from typing_extensions import override

from mil_anchor.callbacks.recorder import batch_entry

# By then the callbacks have found the attention, which costs more than a step.
_SETTLED = 10
_MB = 1_000_000


class StepCost(Callback):
    """Counts the FLOPs of one training step and of one inference, and the step's peak memory.

    The step is the 11th of an epoch, or the last of a shorter one (of the second epoch, if it is
    the only one): the same bags for every plug-in with the same seed. Counting changes no result,
    and costs nothing in other steps. A fit resumed after that step keeps what its checkpoint says.
    Put it before all other callbacks, so that it leaves out what they do between the steps. With
    several processes each counts its own.

    Attributes:
        costs: ``cost/flops_step``: FLOPs of all matrix products, convolutions and attention kernels
            (two for a product and its sum) in forward, backward and plug-ins;
            ``cost/instances_step``: instances of its bags, without padding;
            ``cost/peak_memory_mb``: in 10^6 bytes, on CUDA all that torch has allocated at the
            step's peak, elsewhere the weights, the optimizer's state and the tensors that the
            step makes;
            ``cost/flops_inference`` and ``cost/instances_inference``: of the first validation
            batch. What was not counted is left out.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> cost = StepCost()
        >>> trainer = Trainer(callbacks=[cost], logger=False, accelerator="cpu")

    Source: Tables 14 and 15 of ASMIL (arXiv 2603.06658) report costs; the formulas are those of
    torch's ``FlopCounterMode``, and its count is the same.
    """

    def __init__(self) -> None:
        self.costs: dict[str, int | float] = {}
        self._stage = ""
        self._meter: _Meter | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "fit":
            self.costs = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"costs": self.costs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A later evaluation may load a checkpoint that is older than the counted step.
        self.costs = {**state_dict["costs"], **self.costs}

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        n_batches = trainer.num_training_batches
        is_settled = n_batches > 1 or trainer.current_epoch > 0
        if "cost/flops_step" in self.costs or not is_settled:
            return
        if batch_idx == min(_SETTLED, n_batches - 1):
            self._meter = _Meter(pl_module.device, (*_held_by(pl_module), *_held_beside(trainer)))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._meter is not None:
            self.costs["cost/peak_memory_mb"] = self._meter.peak_bytes / _MB
            self._take("step", batch)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if "cost/flops_inference" not in self.costs and batch_idx == 0:
            self._meter = _Meter(pl_module.device, ())

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
        if self._meter is not None:
            self._take("inference", batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()  # a callback may have ended the epoch at the start of the step

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _take(self, what: str, batch: Any) -> None:
        if self._meter is None:
            return
        self.costs[f"cost/flops_{what}"] = self._meter.flops
        mask = batch_entry(batch, "mask")
        if isinstance(mask, Tensor):
            self.costs[f"cost/instances_{what}"] = int(mask.sum())
        self._stop()

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.stop()
            self._meter = None


def _count_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _count_attention_backward(
    of_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    shapes = (tensor.shape for tensor in (of_output, query, key, value))
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_DEVICE = torch.ops.prim.device.default
_FORMULAS = {
    **flop_registry,
    # torch's registry has the attention kernels of CUDA only.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
}


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts from its making until it is stopped, which hooks cannot do with a block.

    Of memory it adds up the storages of tensors that operators return, as long as these live; what
    an operator is given and has not returned before was there already, as is what is held. torch's
    own ``FlopCounterMode`` tells modules apart as well, by hooks on gradients, and fails where a
    module runs again without them.
    """

    # Which torch asks of a mode.
    supports_higher_order_operators = True

    def __init__(self, device: torch.device, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._device = device
        self._alive: dict[int, ref[UntypedStorage]] = {}
        self._n_bytes = 0
        self._peak_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for tensor in held:
            self._add(tensor, was_there=True)
        self._stack = ExitStack()
        self._stack.enter_context(self)

    @property
    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._peak_bytes

    def stop(self) -> None:
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is None and isinstance(func, OpOverload) and func is not _DEVICE:
            with self:  # what it is made of may have one
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for leaf in tree_leaves((args, kwargs)):
            self._add(leaf, was_there=True)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            self._add(leaf, was_there=False)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _add(self, leaf: Any, *, was_there: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return
        storage = leaf.untyped_storage()
        key, n_bytes = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def remove(_: Any) -> None:
            del self._alive[key]
            self._n_bytes -= n_bytes

        # torch keeps a storage's Python object as long as the storage: saved for backward, too.
        self._alive[key] = ref(storage, remove)
        self._n_bytes += n_bytes
        if was_there:
            self._peak_bytes += n_bytes
        else:
            self._peak_bytes = max(self._peak_bytes, self._n_bytes)


def _held_by(module: LightningModule) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _held_beside(trainer: Trainer) -> Iterator[Tensor]:
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
