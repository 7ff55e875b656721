"""Projection and gated scorer on the CPU: less memory and fewer passes than operation by operation.

Both hold the same parameters as the `nn.Module` that uses them and give the same numbers as its
plain layers, which stay the documentation and run wherever `can_fuse` says no.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from baselines.backward import once_differentiable, taken_over

# Rows at a time: what lies between two products then stays in the cache.
_CHUNK = 512
_DRAWS = 2**16


def can_fuse(values: Tensor) -> bool:
    """Whether plain layers may be passed over for these values, as far as they can tell.

    Outside the CPU, in low precision, under autocast, ``torch.compile``, tracing and transforms
    such as vmap the plain layers are as good, or the only ones that work.
    """
    return (
        values.device.type == "cpu"
        and values.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def fused_projection(
    features: Float[Tensor, "bag instance width"], linear: nn.Linear, dropout: nn.Dropout
) -> Float[Tensor, "bag instance hidden"]:
    """``dropout(relu(W x + b))`` that keeps nothing but its result.

    Args:
        features: The instances x.
        linear: W and b.
        dropout: Draws what is dropped by `kept_entries`.
    """
    keep = _keep_probability(dropout)
    projected: Tensor = _Projection.apply(  # type: ignore[no-untyped-call]
        features, linear.weight, linear.bias, keep
    )
    return projected


def fused_gated_scores(
    instances: Float[Tensor, "bag instance width"],
    value: nn.Linear,
    gate: nn.Linear,
    score: nn.Linear,
    *dropouts: nn.Dropout,
) -> tuple[Float[Tensor, "bag instance row"], Float[Tensor, "bag instance width"]]:
    """``w^T (tanh(V h) * sigmoid(U h))`` of the instances h, and h itself.

    What reads h from here and not from the input leaves its gradient to this function, which adds
    its own in place: one buffer of that size instead of two.

    Args:
        instances: The instances h.
        value: V and its bias.
        gate: U and its bias.
        score: w and its bias, one per row.
        dropouts: Those of the two factors; what is dropped is drawn by `kept_entries`.
    """
    # An entry of the product is there if both factors are: one draw, of the joint probability.
    keep = math.prod(_keep_probability(dropout) for dropout in dropouts)
    parameters = [p for linear in (value, gate, score) for p in (linear.weight, linear.bias)]
    if not torch.is_grad_enabled():
        flat = instances.flatten(0, 1)
        sigmoids = flat.new_empty(min(_CHUNK, len(flat)), 2 * value.out_features)
        scores, _ = _gated_scores(flat, parameters, keep, sigmoids)
        return scores.view(*instances.shape[:2], -1), instances
    scores, handed_on = _GatedScores.apply(  # type: ignore[no-untyped-call]
        instances, *parameters, keep
    )
    return scores, handed_on if instances.requires_grad else instances


def kept_entries(shape: torch.Size | tuple[int, int], keep: float) -> UInt8[Tensor, "row width"]:
    """Draws which entries a dropout keeps (1), each with the probability `nearest_keep` of it.

    One draw of 64 bits decides four entries: a ninth of the time of ``torch.bernoulli``.
    """
    bits = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[: math.prod(shape)].view(shape)
    # Multiplying by bytes is four times as fast as by booleans.
    return torch.lt(
        drawn, _level(keep) - _DRAWS // 2, out=drawn.new_empty(shape, dtype=torch.uint8)
    )


def nearest_keep(keep: float) -> float:
    """The probability by which `kept_entries` keeps: a multiple of 2**-16, between 0 and 1."""
    return _level(keep) / _DRAWS


def _level(keep: float) -> int:
    return min(max(1, round(keep * _DRAWS)), _DRAWS - 1)


def _keep_probability(dropout: nn.Dropout) -> float:
    return 1 - dropout.p if dropout.training else 1.0


class _Projection(torch.autograd.Function):
    """The backward pass needs no dropout mask: a result is positive where both let it through."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, keep: float) -> Tensor:
        flat = features.flatten(0, 1)
        hidden = torch.addmm(bias, flat, weight.t()).relu_()
        if keep < 1:
            for start in range(0, len(hidden), _CHUNK):
                rows = hidden[start : start + _CHUNK]
                rows.mul_(kept_entries(rows.shape, keep)).mul_(1 / nearest_keep(keep))
        ctx.keep = keep
        ctx.save_for_backward(flat, weight, hidden)
        return hidden.view(*features.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, hidden = ctx.saved_tensors
        of_linear = taken_over(gradient).flatten(0, 1)
        torch.ops.aten.threshold_backward.grad_input(of_linear, hidden, 0, grad_input=of_linear)
        # On what is small, and not on the gradient of the hidden instances.
        scale = 1 / nearest_keep(ctx.keep) if ctx.keep < 1 else 1.0
        of_features = None
        if ctx.needs_input_grad[0]:
            of_features = (of_linear @ (scale * weight)).view(*gradient.shape[:2], -1)
        return of_features, (of_linear.t() @ flat).mul_(scale), of_linear.sum(0).mul_(scale), None


class _GatedScores(torch.autograd.Function):
    """Returns h too: its consumers' gradient comes here first, and h has one gradient only."""

    @staticmethod
    def forward(ctx: Any, instances: Tensor, *parameters_and_keep: Any) -> tuple[Tensor, Tensor]:
        *parameters, keep = parameters_and_keep
        value, _, gate, _, weight, _ = parameters
        flat = instances.flatten(0, 1)
        sigmoids = flat.new_empty(len(flat), 2 * len(value))
        scores, kept = _gated_scores(flat, parameters, keep, sigmoids)
        ctx.keep = keep
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(flat, value, gate, weight, sigmoids, kept)
        # No view, so that whoever gets the scores may change them in place.
        shape = (*instances.shape[:2], scores.shape[1])
        return torch.ops.aten._unsafe_view(scores, shape), instances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scores: Tensor | None, of_instances: Tensor | None) -> Any:
        if of_scores is None:
            return of_instances, *[None] * 7
        flat, value, gate, weight, sigmoids, kept = ctx.saved_tensors
        inner_weight = _merged(value, gate)
        weight = _outer_weight(weight, ctx.keep)
        has_consumers = of_instances is not None
        if of_instances is not None:
            of_instances = taken_over(of_instances)
        elif ctx.needs_input_grad[0]:
            of_instances = flat.new_empty(*of_scores.shape[:2], flat.shape[1])
        of_rows = of_scores.flatten(0, 1)
        of_weight, of_inner = torch.empty_like(weight), torch.empty_like(inner_weight)
        of_inner_bias = inner_weight.new_zeros(len(inner_weight))
        for start in range(0, len(flat), _CHUNK):
            rows = slice(start, start + _CHUNK)
            tanh, sigmoid = _factors(sigmoids[rows])
            product, of_product = tanh * sigmoid, of_rows[rows] @ weight
            if kept is not None:
                product *= kept[rows]
                of_product *= kept[rows]
            _add_product(of_weight, of_rows[rows].t(), product, is_first=start == 0)
            of_linear = _of_linear(of_product, tanh, sigmoid, sigmoids[rows])
            _add_product(of_inner, of_linear.t(), flat[rows], is_first=start == 0)
            of_inner_bias += of_linear.sum(0)
            if of_instances is not None:
                own = of_instances.flatten(0, 1)[rows]
                _add_product(own, of_linear, inner_weight, is_first=not has_consumers)
        of_value, of_gate = of_inner.chunk(2)
        of_value_bias, of_gate_bias = of_inner_bias.chunk(2)
        return (
            of_instances,
            2 * of_value,
            2 * of_value_bias,
            of_gate,
            of_gate_bias,
            _outer_weight(of_weight, ctx.keep),
            of_rows.sum(0),
            None,
        )


def _gated_scores(
    flat: Tensor, parameters: Sequence[Tensor], keep: float, sigmoids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scores and what dropout has kept.

    The sigmoids have room for all instances, and then `_factors` can be taken from them afterwards,
    or for one chunk.
    """
    value, value_bias, gate, gate_bias, weight, bias = parameters
    inner_weight, inner_bias = _merged(value, gate).t(), _merged(value_bias, gate_bias)
    outer_weight = _outer_weight(weight, keep).t()
    kept = None
    if keep < 1:
        kept = kept_entries((len(flat), len(value)), keep)
    scores = flat.new_empty(len(flat), len(weight))
    for start in range(0, len(flat), _CHUNK):
        rows = slice(start, start + _CHUNK)
        room = start % len(sigmoids)
        part = sigmoids[room : room + len(scores[rows])]
        torch.addmm(inner_bias, flat[rows], inner_weight, out=part).sigmoid_()
        tanh, sigmoid = _factors(part)
        product = tanh.mul_(sigmoid)
        if kept is not None:
            product *= kept[rows]
        torch.addmm(bias, product, outer_weight, out=scores[rows])
    return scores, kept


def _merged(of_value: Tensor, of_gate: Tensor) -> Tensor:
    """V and U in one matrix, for one sigmoid of both: ``tanh(x) / 2 = sigmoid(2x) - 1/2``.

    torch's tanh takes five times as long. Where x is small the result is off by rounding of one.
    """
    return torch.cat([2 * of_value, of_gate])


def _factors(sigmoids: Tensor) -> tuple[Tensor, Tensor]:
    """Half the tanh and the sigmoid, from the sigmoids of `_merged`."""
    doubled, gate = sigmoids.chunk(2, dim=1)
    return doubled - 0.5, gate


def _outer_weight(weight: Tensor, keep: float) -> Tensor:
    """What the halves of `_factors`, and what dropout has left of them, are multiplied by."""
    return weight * (2 / nearest_keep(keep) if keep < 1 else 2)


def _of_linear(of_product: Tensor, tanh: Tensor, sigmoid: Tensor, sigmoids: Tensor) -> Tensor:
    """The gradient of what went into the sigmoids, from that of the product of both factors."""
    gradient = torch.empty_like(sigmoids)
    of_tanh, of_sigmoid = gradient.chunk(2, dim=1)
    torch.mul(of_product, sigmoid, out=of_tanh)
    torch.mul(of_product, tanh, out=of_sigmoid)
    torch.ops.aten.sigmoid_backward.grad_input(gradient, sigmoids, grad_input=gradient)
    return gradient


def _add_product(into: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    torch.addmm(into, left, right, beta=0 if is_first else 1, out=into)
