"""Walks through the autograd graph: which parameters lead where."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

_VIEWS = (
    "ViewBackward",
    "UnsafeViewBackward",
    "ReshapeAliasBackward",
    "SqueezeBackward",
    "UnsqueezeBackward",
    "TBackward",
    "TransposeBackward",
    "PermuteBackward",
    "AsStridedBackward",
)
_NORMALIZERS = ("SoftmaxBackward", "LogSoftmaxBackward", "SafeSoftmaxBackward", "ExpBackward")


def nodes_of(scores: Sequence[Tensor]) -> list[Any]:
    """Where the scores are in the autograd graph."""
    nodes: list[Any] = []
    for tensor in scores:
        node = tensor.grad_fn
        if node is not None and node.name() == "CloneBackward0":  # the recorder's own copy
            node = node.next_functions[0][0]
        nodes.append(node)
        # A change in place of a view hangs the loss below the view.
        while node is not None and node.name().startswith(_VIEWS):
            node = node.next_functions[0][0]
            nodes.append(node)
    return nodes


def parameters_beside(scores: Sequence[Any], outputs: Sequence[Tensor], loss: Tensor) -> set[int]:
    """Parameters that reach the loss through submodules' outputs, and not through the scores.

    A penalty on the parameters themselves is no such way.
    """
    nodes = {node for tensor in outputs for node in nodes_of([tensor])}
    reached = [node for node in _walk([loss.grad_fn], without=scores) if node in nodes]
    return parameters_below(reached, without=scores)


def parameters_between(nodes: Sequence[Any], loss: Tensor) -> set[int]:
    """Parameters that come in between the scores and the normalisation that they go into."""
    users: dict[Any, list[Any]] = {}
    for node in _walk([loss.grad_fn], without=nodes):
        for following, _ in node.next_functions:
            users.setdefault(following, []).append(node)
    # Upwards from the scores, up to the next normalisation.
    upwards: set[Any] = set()
    normalizers = []
    waiting = [user for node in nodes for user in users.get(node, [])]
    while waiting:
        node = waiting.pop()
        if node in upwards:
            continue
        upwards.add(node)
        if node.name().startswith(_NORMALIZERS):
            normalizers.append(node)
        else:
            waiting += users.get(node, [])
    # Downwards from there on the same ways: what else comes in.
    beside = [
        following
        for node in _walk(normalizers, without=nodes)
        if node in upwards
        for following, _ in node.next_functions
        if following not in upwards and following not in nodes
    ]
    return parameters_below(beside, without=nodes)


def _walk(start: Sequence[Any], *, without: Sequence[Any]) -> Iterator[Any]:
    """The nodes below some nodes of the autograd graph, themselves too, not passing others."""
    known = {None, *without}
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node in known:
            continue
        known.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def parameters_below(start: Sequence[Any], *, without: Sequence[Any]) -> set[int]:
    """Ids of the parameters below some nodes."""
    nodes = _walk(start, without=without)
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}
