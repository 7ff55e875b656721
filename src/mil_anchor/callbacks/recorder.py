"""Records what an attention block does while a model runs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mil_anchor.site import AttentionSite

# Models mask with -inf, the lowest finite number or -1e9; no score that is meant comes near.
_MASKED = -1e8


class RecordedAttention(NamedTuple):
    """One call of the attention block.

    Args:
        scores: Raw scores, with their graph where there is one.
        mask: True marks a real instance; None: all are real.
        args: Positional inputs of the block, detached.
        kwargs: Keyword inputs of the block, detached.
    """

    scores: Float[Tensor, "bag row instance"]
    mask: Bool[Tensor, "bag instance"] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def features(self) -> Tensor | None:
        """The block's first tensor input."""
        return _first_tensor(self.args, self.kwargs)


class AttentionRecorder:
    """Hooks on one attention block; they record between `start` and `stop` and are idle otherwise.

    Which instances are real is told by the batch, ``batch["mask"]`` or ``batch.mask`` of shape
    (bag, instance), and by the model: scores of -1e8 and below are masked. A batch without a mask
    counts as unpadded.

    Args:
        root: The module that the site's path starts from.
        site: The attention block and how its scores are read.
        only_with_grad: Leave out calls under no_grad (teacher passes, reentrant checkpointing).
    """

    def __init__(self, root: nn.Module, site: AttentionSite, *, only_with_grad: bool) -> None:
        self.site = site
        self.block = site.find_block(root)
        self._tells_layout = site.layout is None
        self._only_with_grad = only_with_grad
        self._recording = False
        self._tapped: Any = None
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any, list[int]]] = []
        tap = site.find_tap(self.block)
        self._handles: list[RemovableHandle] = []
        if tap is not self.block:
            self._handles.append(
                tap.register_forward_hook(_Hook(self, "_on_tap"), with_kwargs=True)
            )
        self._handles.append(
            self.block.register_forward_hook(_Hook(self, "_on_block"), with_kwargs=True)
        )
        self._tap = tap

    @property
    def has_calls(self) -> bool:
        """Whether a call waits to be taken."""
        return bool(self._calls)

    def start(self) -> None:
        """Forget earlier calls and record from now on."""
        self._calls.clear()
        self._recording = True

    def stop(self) -> None:
        """Stop recording and forget the calls that were not taken."""
        self._recording = False
        self._tapped = None
        self._calls.clear()

    def remove(self) -> None:
        """Take the hooks off the model and forget everything."""
        for handle in self._handles:
            handle.remove()
        self.stop()

    def take(self, batch: Any) -> list[RecordedAttention]:
        """The calls recorded so far, in order; they are forgotten here.

        Args:
            batch: The batch that the model ran on, for its mask and number of bags.

        Raises:
            RuntimeError: The model has changed the block's inputs in place since.
            ValueError: The scores do not fit the site, or it cannot be told which are padding.
        """
        calls, self._calls = self._calls, []
        mask, n_bags = _batch_mask(batch), _n_bags(batch)
        read = []
        for args, kwargs, output, versions in calls:
            # Without gradients nothing runs again on these inputs.
            if self._only_with_grad and _versions((args, kwargs)) != versions:
                raise RuntimeError(
                    f"The inputs of attention block '{self.site.block}' must stay as they were "
                    "when it ran, but the model has changed them in place. Replace the in-place "
                    "operation after the block, or name a block whose input is left alone."
                )
            features = _first_tensor(args, kwargs)
            self.site = self.site.with_layout(output, features)
            scores = self.site.read(output, features=features, n_bags=n_bags)
            scores = scores.masked_fill(scores <= _MASKED, -torch.inf)
            read.append(RecordedAttention(scores, None, args, kwargs))
        n_read = sum(len(call.scores) for call in read)
        # Several calls of the block are several distributions of each bag.
        if self._tells_layout and n_bags is not None and n_read % n_bags:
            raise ValueError(
                f"The layout of block '{self.site.block}' was told from its input as "
                f"'{self.site.layout}', but that gives {n_read} bags for a batch of {n_bags}. "
                f"Write AttentionSite('{self.site.block}', layout='(b n) r') with the axes that "
                "hold."
            )
        if mask is None or bool(mask.all()):
            return read
        masks = _masks_of_calls(self.site.block, [call.scores for call in read], mask)
        return [call._replace(mask=own) for call, own in zip(read, masks, strict=True)]

    def _on_tap(self, _args: Any, _kwargs: Any, output: Any) -> None:
        if self._wanted():
            self._tapped = output

    def _on_block(self, args: Any, kwargs: Any, output: Any) -> None:
        if not self._wanted():
            return
        output = output if self._tap is self.block else self._tapped
        self._tapped = None
        inputs = apply_to_collection((args, kwargs), Tensor, Tensor.detach)
        # Models mask the scores in place afterwards: keep them as they are now.
        kept = apply_to_collection(output, Tensor, Tensor.clone)
        self._calls.append((*inputs, kept, _versions(inputs)))

    def _wanted(self) -> bool:
        return self._recording and (torch.is_grad_enabled() or not self._only_with_grad)


class _Hook:
    """A forward hook that stays behind when its module is copied or pickled."""

    def __init__(self, recorder: AttentionRecorder, method: str) -> None:
        # Compiled code leaves its graph for the hook: what it keeps is Python state.
        self._record = torch.compiler.disable(getattr(recorder, method))  # type: ignore[no-untyped-call]

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._record(args, kwargs, output)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_idle_hook, ()


def _make_idle_hook() -> Callable[..., None]:
    return _idle_hook


def _idle_hook(*_: Any) -> None:
    """What a copied module has in the place of our hook."""


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _versions(inputs: Any) -> list[int]:
    versions: list[int] = []
    apply_to_collection(inputs, Tensor, lambda tensor: versions.append(tensor._version))
    return versions


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


def _n_bags(batch: Any) -> int | None:
    for name in ("mask", "label", "bag_id"):
        entry = batch_entry(batch, name)
        if (isinstance(entry, Tensor) and entry.ndim > 0) or isinstance(entry, list | tuple):
            return len(entry)
    return None


def _masks_of_calls(block: str, scores: list[Tensor], mask: Tensor) -> list[Tensor | None]:
    """Which instances of each call are real, when the batch holds padding."""
    shapes = [(len(values), values.shape[-1]) for values in scores]
    if all(shape == tuple(mask.shape) for shape in shapes):
        return [mask] * len(scores)
    # A model that takes its bags one by one, each without its padding.
    if shapes == [(1, int(n_instances)) for n_instances in mask.sum(dim=-1)]:
        return [None] * len(scores)
    raise ValueError(
        f"The scores of block '{block}' must cover the batch's bags, padding included, but the "
        f"mask is {tuple(mask.shape)} and the calls have (bag, instance) = {shapes}. "
        "Use batch_size=1, or a block that sees whole bags."
    )
