"""Watches which attention distributions a model computes, whatever code computes them."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

# Of a map between all instances of a large bag only the first row, the class token's, is kept.
_LARGE_MAP = 1_000_000


class Normalization(NamedTuple):
    """One normalisation that a model has run; the normalised axis comes last.

    Args:
        scores: Its argument, detached. Of exponentials divided by their sum: the logarithm of the
            result, which is the argument up to a constant for each row.
        attention: Its result.
        function: "softmax", "exp" or "sigmoid": what made the weights positive.
    """

    scores: Float[Tensor, "*rows instance"]
    attention: Float[Tensor, "*rows instance"]
    function: str

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

    def stop(self) -> None:
        """Record no more and forget everything."""
        self.active = False
        self.seen = []
        self._weights = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.active:
            name = func._schema.name.removeprefix("aten::")
            if name in ("_softmax", "_safe_softmax"):
                self._note(args[0], result, args[1])
            elif name == "_log_softmax":
                self._note(args[0], result.exp(), args[1])
            elif name in ("exp", "sigmoid"):
                self._weights[_storage(result)] = (name, result)
            elif name == "div" and isinstance(args[0], Tensor):
                self._note_division(args[0], args[1], result)
            elif name.startswith("_scaled_dot_product") and not name.endswith("backward"):
                names = [argument.name for argument in func._schema.arguments]
                self._note_products(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return result

    def _note(self, scores: Tensor, attention: Tensor, axis: int, name: str = "softmax") -> None:
        if scores.ndim == 0 or not scores.is_floating_point():
            return
        scores, attention = scores.movedim(axis, -1), attention.movedim(axis, -1)
        n_rows, n_keys = scores.shape[-2:] if scores.ndim > 2 else (0, 0)
        if n_rows >= n_keys and n_rows * n_keys > _LARGE_MAP:
            scores, attention = scores[..., :1, :], attention[..., :1, :]
        # Copies: the model may go on in place.
        self.seen.append(Normalization(scores.detach().clone(), attention.detach().clone(), name))

    def _note_division(self, weights: Tensor, total: Any, attention: Tensor) -> None:
        known = self._weights.get(_storage(weights))
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
        if query.shape[-2] * key.shape[-2] > _LARGE_MAP:
            query = query[..., :1, :]
        scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])
        scores = query.float() @ key.float().mT * scale
        bias = given.get("attn_mask", given.get("attn_bias"))
        if bias is not None:
            bias = bias[..., : scores.shape[-2], :]
            hidden = ~bias if bias.dtype == torch.bool else None
            scores = scores + bias if hidden is None else scores.masked_fill(hidden, -torch.inf)
        self._note(scores, scores.softmax(dim=-1), -1)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
