"""Watches which attention distributions a model computes, whatever code computes them."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

# Of a larger map between all instances only the first row, the class token's, is kept.
_LARGE_MAP = 1_000_000
# Some models mask with a number that half precision holds; then the attention is exactly zero.
_MASKED_IN_HALF = -5e3


class Normalization(NamedTuple):
    """One normalisation that a model has run; the normalised axis comes last.

    Args:
        scores: Its argument, detached, -inf where it is masked. Of exponentials divided by their
            sum: the logarithm of the result, which is the argument up to a constant for each row.
        function: "softmax", "exp" or "sigmoid": what made the weights positive.
    """

    scores: Float[Tensor, "*rows instance"]
    function: str

    @property
    def attention(self) -> Float[Tensor, "*rows instance"]:
        """Its result."""
        return self.scores.softmax(dim=-1) if self.function == "softmax" else self.scores.exp()

    @property
    def is_plain(self) -> bool:
        """Whether the result is a softmax of the argument: exponentials that sum to one."""
        if self.function == "exp":
            totals = self.attention.double().sum(dim=-1)
            tolerance = max(1e-5, 16 * torch.finfo(self.attention.dtype).eps)
            return bool(((totals - 1).abs() < tolerance).all())
        return self.function == "softmax"


class NormalizationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records normalisations while it is entered and `active`.

    It sees the operations themselves, below autograd and modules: ``softmax`` in any spelling,
    fused attention kernels, and exponentials or sigmoids that are divided by something. It changes
    no result and draws no random numbers.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active = True
        self.seen: list[Normalization] = []
        # Positive weights by storage, since what divides them gets a view.
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self._classes: dict[int, Normalization | None] = {}

    def stop(self) -> None:
        """Record no more and forget everything."""
        self.active = False
        self.seen = []
        self._weights = {}
        self._classes = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.active and isinstance(result, Tensor | tuple):
            self._look(func, args, kwargs or {}, result)
        return result

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("nll_loss") and name.endswith("forward"):
            # The classes of a cross-entropy: no attention.
            self.seen = [one for one in self.seen if one is not self._classes.get(_key(args[0]))]
        elif name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            names = [argument.name for argument in func._schema.arguments]
            self._note_products(dict(zip(names, args, strict=False)) | kwargs)
        elif not args or not _is_plain_tensor(args[0]) or not _is_plain_tensor(result):
            return
        elif name in ("_softmax", "_safe_softmax"):
            self._note(args[0], result, args[1])
        elif name == "_log_softmax":
            self._note(args[0], result.exp(), args[1])
            self._classes[_key(result)] = self.seen[-1] if self.seen else None
        elif name in ("exp", "sigmoid"):
            self._weights[_key(result)] = (name, result)
        elif name == "mul" and (known := self._weights.get(_key(args[0]))) is not None:
            # Positive weights times a mask.
            if known[1].numel() == result.numel():
                self._weights[_key(result)] = (known[0], result)
        elif name == "div":
            self._note_division(args[0], args[1], result)

    def _note(self, scores: Tensor, attention: Tensor, axis: int, name: str = "softmax") -> None:
        if scores.ndim == 0 or not scores.is_floating_point():
            return
        scores, attention = scores.detach().movedim(axis, -1), attention.movedim(axis, -1)
        n_rows, n_keys = scores.shape[-2:] if scores.ndim > 2 else (0, 0)
        if n_rows >= n_keys and scores.numel() > _LARGE_MAP:
            scores, attention = scores[..., :1, :], attention[..., :1, :]
        # A copy: the model may go on in place.
        masked = (attention == 0) & (scores <= _MASKED_IN_HALF)
        self.seen.append(Normalization(scores.masked_fill(masked, -torch.inf), name))

    def _note_division(self, weights: Tensor, total: Any, attention: Tensor) -> None:
        known = self._weights.get(_key(weights))
        if known is None or known[1].numel() != attention.numel() or attention.ndim == 0:
            return
        shape = attention.shape
        if isinstance(total, Tensor) and total.ndim == attention.ndim:
            summed = [axis for axis in range(total.ndim) if total.shape[axis] == 1 < shape[axis]]
        else:
            summed = []
        # Sums that were scattered back to the instances do not show the axis: the longest one.
        axis = summed[0] if len(summed) == 1 else max(range(len(shape)), key=lambda i: shape[i])
        self._note(attention.log(), attention, axis, known[0])

    def _note_products(self, given: dict[str, Any]) -> None:
        query, key = given["query"], given["key"]
        if not _is_plain_tensor(query) or not _is_plain_tensor(key):
            return
        if query.shape[:-2].numel() * query.shape[-2] * key.shape[-2] > _LARGE_MAP:
            query = query[..., :1, :]
        if query.ndim > 3 and query.shape[-3] != key.shape[-3]:  # queries in groups
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])
        scores = query.float() @ key.float().mT * scale
        bias = given.get("attn_mask", given.get("attn_bias"))
        if bias is not None:
            bias = bias[..., : scores.shape[-2], :]
            hidden = ~bias if bias.dtype == torch.bool else None
            scores = scores + bias if hidden is None else scores.masked_fill(hidden, -torch.inf)
        self._note(scores, scores.softmax(dim=-1), -1)


def _is_plain_tensor(value: Any) -> bool:
    """Whether it has a storage of its own: no sparse, nested or wrapped tensor."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and not value.is_nested
    )


def _key(tensor: Tensor) -> int:
    """What a tensor and its views share."""
    return tensor.untyped_storage().data_ptr() if _is_plain_tensor(tensor) else -1
