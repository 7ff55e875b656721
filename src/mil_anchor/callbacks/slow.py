"""SlowWeights: evaluates a model with the exponential moving average (EMA) of its weights."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mil_anchor.anchor import check_decay
from mil_anchor.callbacks.evaluated import EvaluatedWeights
from mil_anchor.callbacks.optimizers import has_moved, parameters_of
from mil_anchor.callbacks.processes import share, tell
from mil_anchor.schedules import warmed_up

# What normalisation layers average by themselves, in PyTorch's naming.
_STATISTICS = ("running_mean", "running_var")


class SlowWeights(EvaluatedWeights):
    """Validates and tests the EMA of the whole model; training is untouched, bit for bit.

    After each step of an optimizer, the slow weights follow the parameters it owns:
    ``slow <- m_t slow + (1 - m_t) online`` with ``m_t = min(m, (1 + t) / (10 + t))`` after t
    steps, or ``m_t = m`` without warm-up. A parameter that joins an optimizer later starts from its
    value after its first step. Averaged as well are the running statistics of normalisation layers;
    all other buffers (integers, masks, counters) and parameters that no optimizer owns are the
    model's own. Averages are kept in float32 at least, here and not in the model.

    See `EvaluatedWeights` for where the slow weights are in the model, and for its checkpoints.

    Args:
        decay: The EMA factor m, in [0, 1).
        warmup: Whether early, fast-changing weights are followed more closely.

    Raises:
        ValueError: The decay lies outside [0, 1).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SlowWeights()], logger=False, accelerator="cpu")

    Source: Polyak averaging; the warm-up as in TensorFlow's ExponentialMovingAverage (num_updates).
    Not built on Lightning 2.6's ``EMAWeightAveraging``, of which nothing would be left: it copies
    instead of averaging at its first step, averages integer buffers, averages once more for a step
    that the AMP scaler skipped, gives the module's ``on_validation_epoch_end`` the training weights
    again, leaves the average in a model whose validation breaks off, and in a checkpoint saved
    after the fit writes it over the training weights, so that no resume can go on from them.
    """

    evaluate = "slow"

    def __init__(self, decay: float = 0.999, *, warmup: bool = True) -> None:
        check_decay(decay)
        self.decay = decay
        self.warmup = warmup
        self._slow: dict[str, Tensor] = {}
        self._n_updates: Counter[int] = Counter()
        self._saved: dict[str, Any] | None = None
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._slow, self._n_updates = {}, Counter()
        self._saved = None

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Called before the model is on its device, and by validate and test too: only kept.
        self._saved = state_dict

    @override
    def state_dict(self) -> dict[str, Any]:
        slow = {name: tensor.detach().cpu().clone() for name, tensor in self._slow.items()}
        return {"slow": slow, "n_updates": dict(self._n_updates)}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The weights are final: loaded, and broadcast from rank 0.
        owned = {id(p) for optimizer in trainer.optimizers for p in parameters_of(optimizer)}
        self._slow = {
            name: _average_of(tensor)
            for name, tensor in _averaged(pl_module)
            if id(tensor) in owned or not isinstance(tensor, nn.Parameter)
        }
        if self._saved is not None:
            self._restore(pl_module, self._saved)
        elif trainer.ckpt_path is not None:
            tell(
                f"The checkpoint {trainer.ckpt_path} holds no state of SlowWeights: the average "
                "starts from the loaded weights."
            )
        self._saved = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for index, optimizer in enumerate(trainer.optimizers):
            hook = self._after_step_of(index, pl_module)
            self._handles.append(optimizer.register_step_post_hook(hook))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_statistics()
        super().on_validation_start(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_statistics()
        self._let_go()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        # The Trainer has taken the model off the device, too.
        self._slow = {name: tensor.cpu() for name, tensor in self._slow.items()}

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    @override
    def replacements(self, pl_module: LightningModule) -> Sequence[tuple[Tensor, Tensor]]:
        return [
            (tensor, self._slow[name])
            for name, tensor in _averaged(pl_module)
            if name in self._slow
        ]

    def _after_step_of(self, index: int, module: LightningModule) -> Callable[..., None]:
        # Once: to walk through all modules in each step costs more than the average itself.
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        statistics = list(_statistics_in(module))

        def follow(optimizer: Optimizer, *_: Any) -> None:
            owned = [(names[id(p)], p) for p in parameters_of(optimizer) if id(p) in names]
            if has_moved(optimizer, (parameter for _, parameter in owned)):
                buffers = [(name, getattr(layer, leaf)) for name, layer, leaf in statistics]
                self._move(index, [*owned, *buffers])

        return follow

    @torch.no_grad()
    def _move(self, index: int, online: Sequence[tuple[str, Tensor]]) -> None:
        n_updates = self._n_updates[index]
        decay = warmed_up(self.decay, n_updates) if self.warmup else self.decay
        self._n_updates[index] += 1
        averages, targets = [], []
        for name, tensor in online:
            average = self._slow.get(name)
            if average is not None:
                averages.append(average)
                targets.append(tensor.detach().to(average.dtype))
            elif _can_be_averaged(tensor):
                self._slow[name] = _average_of(tensor)
        if averages:
            torch._foreach_lerp_(averages, targets, 1 - decay)

    def _restore(self, module: LightningModule, saved: dict[str, Any]) -> None:
        own = dict(_averaged(module))
        wrong = sorted(
            name
            for name, tensor in saved["slow"].items()
            if name not in own or own[name].shape != tensor.shape
        )
        if wrong:
            raise ValueError(
                "Saved slow weights must come from the same model, but it has no such tensors of "
                f"their shapes: {wrong}. Resume with the model that was trained."
            )
        self._slow |= {name: t.to(own[name].device) for name, t in saved["slow"].items()}
        self._n_updates = Counter(saved["n_updates"])

    def _share_statistics(self) -> None:
        """Give all processes rank 0's running statistics: only parameters agree by themselves."""
        share(average for name, average in self._slow.items() if name.endswith(_STATISTICS))

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _averaged(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What of a module may have an average."""
    statistics = ((name, getattr(layer, leaf)) for name, layer, leaf in _statistics_in(module))
    for name, tensor in (*module.named_parameters(), *statistics):
        if _can_be_averaged(tensor):
            yield name, tensor


def _statistics_in(module: LightningModule) -> Iterator[tuple[str, nn.Module, str]]:
    """Names of the running statistics, each with its layer and its name there."""
    for name, layer in module.named_modules():
        for leaf in _STATISTICS:
            if leaf in dict(layer.named_buffers(recurse=False)):
                yield f"{name}.{leaf}".removeprefix("."), layer, leaf


def _can_be_averaged(tensor: Tensor) -> bool:
    # Lazy tensors have no values yet.
    return tensor.is_floating_point() and not nn.parameter.is_lazy(tensor)


def _average_of(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(dtype, copy=True)
