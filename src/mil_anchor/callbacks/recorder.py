"""Records what an attention block does while a model runs."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.hooks import RemovableHandle

from mil_anchor.attention import log_softmax
from mil_anchor.sites.base import (
    ModuleCall,
    PassiveHook,
    RecordedAttention,
    Site,
    map_tensors,
    tensors_in,
    versions_of,
)
from mil_anchor.sites.proof import MASKED


class CallRecorder:
    """Hooks on submodules; they record between `start` and `stop` and are idle otherwise.

    Args:
        watched: The submodules by name.
        only_with_grad: Leave out calls under no_grad (teacher passes, reentrant checkpointing).
        narrow: Keep a copy of an output that is this many times smaller than the input, since
            models mask their scores in place afterwards.
        unread: Names of submodules whose outputs nobody reads: these are not kept.
    """

    def __init__(
        self,
        watched: Mapping[str, nn.Module],
        *,
        only_with_grad: bool,
        narrow: int = 1,
        unread: Collection[str] = (),
    ) -> None:
        self.calls: list[ModuleCall] = []
        self._only_with_grad = only_with_grad
        self._narrow = narrow
        self._unread = frozenset(unread)
        self._recording = False
        self._handles: list[RemovableHandle] = []
        for name, module in watched.items():
            if isinstance(module, torch.jit.ScriptModule):
                self.remove()
                raise ValueError(
                    f"The attention must run in Python to be seen, but {type(module).__name__} of "
                    f"'{name}' was compiled by torch.jit. Script the model after training."
                )
            hook = _Hook(self, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def start(self) -> None:
        """Forget earlier calls and record from now on."""
        self.calls = []
        self._recording = True

    def stop(self) -> None:
        """Stop recording and forget the calls that were not taken."""
        self._recording = False
        self.calls = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing while the context is open."""
        recording, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = recording

    def remove(self) -> None:
        """Take the hooks off the model and forget everything."""
        for handle in self._handles:
            handle.remove()
        self.stop()

    def record(
        self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep a call, if calls are wanted now."""
        with_grad = torch.is_grad_enabled()
        if not self._recording or (self._only_with_grad and not with_grad):
            return
        inputs, outputs = list(tensors_in((args, kwargs))), list(tensors_in(output))
        if any(is_functorch_wrapped_tensor(x) for x in (*inputs, *outputs)):
            return  # under vmap there is no tensor to keep
        size = max((x.numel() for x in inputs), default=0) // self._narrow
        # What a block hands through beside its scores is no result, and as large as a bag.
        # A function of autograd puts out another tensor of the same memory.
        passed = set() if isinstance(output, Tensor) else {_memory_of(x) for x in inputs}

        def keep(value: Tensor) -> Tensor:
            is_small = value.numel() <= size and _memory_of(value) not in passed
            return value.clone() if is_small else value

        kept = None
        # An output in an object of the model's own cannot be looked into.
        if self._narrow > 1 and outputs and not any(x.requires_grad for x in outputs):
            # Of frozen parts, whose tensors nobody keeps, the shapes will do.
            args, kwargs = map_tensors(_shape_of, (args, kwargs))
            kept = map_tensors(lambda x: x.clone() if x.numel() <= size else _shape_of(x), output)
        elif name not in self._unread:
            kept = map_tensors(keep, output)
        versions = (versions_of((args, kwargs)), versions_of(kept)) if with_grad else None
        self.calls.append(ModuleCall(name, module, args, kwargs, kept, versions))


class AttentionRecorder(CallRecorder):
    """Records the attention of one site.

    Which instances are real is told by the batch, ``batch["mask"]`` or ``batch.mask`` of shape
    (bag, instance), by the site, and by the model: scores of -1e8 and below are masked. A batch
    without a mask counts as unpadded.

    Args:
        root: The module that the site's paths start from.
        site: The attention block and how its scores are read.
        only_with_grad: Leave out calls under no_grad.

    Raises:
        ValueError: The root has no such submodules.
    """

    def __init__(self, root: nn.Module, site: Site, *, only_with_grad: bool) -> None:
        self.site = site.bound(root)
        self.block = self.site.find_block(root)
        self._watched = self.site.watched(root)
        self._tells_layout = getattr(site, "layout", "") is None
        unread = [name for name in self._watched if not self.site.reads_output(name)]
        super().__init__(self._watched, only_with_grad=only_with_grad, unread=unread)

    def replay(self, calls: Iterable[ModuleCall]) -> None:
        """Take over the calls of a recorder that has watched every submodule."""
        names: dict[nn.Module, list[str]] = {}
        for name, module in self._watched.items():
            names.setdefault(module, []).append(name)
        self.calls = [
            replace(call, name=name) for call in calls for name in names.get(call.module, [])
        ]

    def take(self, batch: Any) -> list[RecordedAttention]:
        """The attention recorded so far, in order; it is forgotten here.

        Args:
            batch: The batch that the model ran on, for its mask and number of bags.

        Raises:
            RuntimeError: The model has changed the block's inputs in place since.
            ValueError: The scores do not fit the site, or it cannot be told which are padding.
        """
        read = self.look(batch)
        self.calls = []
        return read

    def look(self, batch: Any) -> list[RecordedAttention]:
        """The same as `take`, without forgetting it."""
        calls, mask, n_bags = self.calls, _batch_mask(batch), n_bags_of(batch)
        self.site = self.site.settled(calls)
        read = [
            call._replace(scores=_with_masked(call.scores))
            for call in self.site.read(calls, n_bags)
        ]
        n_read = sum(len(call.scores) for call in read)
        # Several calls of the block are several distributions of each bag.
        if self._tells_layout and n_bags is not None and n_read % n_bags:
            raise ValueError(
                f"The layout of block '{self.site.path}' was told from its input as "
                f"'{getattr(self.site, 'layout', None)}', but that gives {n_read} bags for a "
                f"batch of {n_bags}. Write AttentionSite('{self.site.path}', layout='(b n) r') "
                "with the axes that hold."
            )
        return _with_batch_mask(self.site.path, read, mask)

    def take_by_bag(self, batch: Any, position: str) -> dict[str, Float[Tensor, "row instance"]]:
        """The log-attention recorded so far, on the CPU, by bag id; recording ends here.

        Args:
            batch: The batch that the model ran on; bags of one without ids are named after
            position: its place in the epoch.

        Returns:
            For each bag its real instances in float32.

        Raises:
            ValueError: As `take`, or if the block does not see whole bags.
        """
        calls = self.take(batch)
        self.stop()
        attention = [
            of_bag
            for call in calls
            for of_bag in call.by_bag(log_softmax(call.scores, call.mask).float().cpu())
        ]
        ids = bag_ids(batch, len(attention), position)
        if len(ids) != len(attention):
            raise ValueError(
                "There must be one attention per bag, but the attention block gave "
                f"{len(attention)} for the {len(ids)} bags {ids}. Name a block that sees whole "
                "bags."
            )
        return dict(zip(ids, attention, strict=True))


class _Hook(PassiveHook):
    """A forward hook that stays behind when its module is copied or pickled."""

    def __init__(self, recorder: CallRecorder, name: str) -> None:
        # Compiled code leaves its graph for the hook: what it keeps is Python state.
        self._record = torch.compiler.disable(recorder.record)  # type: ignore[no-untyped-call]
        self._name = name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._record(self._name, module, args, kwargs, output)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_idle_hook, ()


def _with_masked(scores: Tensor) -> Tensor:
    """Scores with -inf where the model masks; most models do not, and pay for one look only."""
    masked = scores.detach() <= MASKED
    return scores.masked_fill(masked, -torch.inf) if bool(masked.any()) else scores


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    is_dense = tensor.layout == torch.strided  # a sparse adjacency has no memory of its own
    return tensor.data_ptr() if is_dense else id(tensor), tensor.numel()


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _make_idle_hook() -> Callable[..., None]:
    return _idle_hook


def _idle_hook(*_: Any) -> None:
    """What a copied module has in the place of our hook."""


def batch_entry(batch: Any, name: str) -> Any:
    """An entry of a batch that is a mapping or an object; None if it has none."""
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def _batch_mask(batch: Any) -> Tensor | None:
    mask = batch_entry(batch, "mask")
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 3 and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    if mask.ndim != 2:
        raise ValueError(
            "The batch's mask must have the shape (bag, instance), True where an instance is real, "
            f"but it has the shape {tuple(mask.shape)}. Reshape it, or give it another name."
        )
    return mask.bool()


def n_bags_of(batch: Any) -> int | None:
    """Number of bags in a batch, where it tells it."""
    for name in ("mask", "bag_id", "features", "label"):
        entry = batch_entry(batch, name)
        if isinstance(entry, Tensor):
            # Flat features and labels of several numbers count something else.
            n_axes = {"features": 3, "label": 1}.get(name, 0)
            if entry.ndim >= max(n_axes, 1) and (name != "label" or entry.ndim == 1):
                return len(entry)
        elif name == "bag_id" and isinstance(entry, list | tuple):
            return len(entry)
    return None


def bag_ids(batch: Any, n_bags: int, position: str) -> list[str]:
    """The ids that a batch gives its bags, or names after its position in the epoch."""
    ids = batch_entry(batch, "bag_id")
    if ids is None:
        return [f"{position}:{index}" for index in range(n_bags)]
    return [str(bag_id) for bag_id in ids]


def _with_batch_mask(
    path: str, read: list[RecordedAttention], mask: Tensor | None
) -> list[RecordedAttention]:
    """Which instances of each call are real, when the batch holds padding."""
    if mask is None or bool(mask.all()):
        return read
    shapes = [(len(call.scores), call.scores.shape[-1]) for call in read]
    if all(shape == tuple(mask.shape) for shape in shapes):
        return [
            call._replace(mask=mask if call.mask is None else mask & call.mask.to(mask.device))
            for call in read
        ]
    # A model that takes its bags one by one, each without its padding.
    if shapes == [(1, int(n_instances)) for n_instances in mask.sum(dim=-1)]:
        return read
    # Parts of bags, each with its part of the mask.
    if all(call.mask is not None for call in read):
        return read
    raise ValueError(
        f"The scores of block '{path}' must cover the batch's bags, padding included, but the "
        f"mask is {tuple(mask.shape)} and the calls have (bag, instance) = {shapes}. "
        "Use batch_size=1, or a block that sees whole bags."
    )
