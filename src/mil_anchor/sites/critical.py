"""The site of DSMIL, whose instances are compared with a critical one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from mil_anchor.sites.base import ModuleCall, RecordedAttention, Site, find_submodule, joined


@dataclass(frozen=True)
class CriticalInstanceSite(Site):
    """DSMIL's attention: each instance's query times that of the critical instance of a class.

    The scores of class c are ``q(h_i) . q(h_m(c)) / sqrt(d)``. The anchor takes the online model's
    critical instances m(c): it does not damp their jumps.

    Args:
        query: Path of the query network. It runs twice per forward, on the instances and on the
            critical ones, or once, if a classifier is named.
        classifier: Path of the instance classifier whose highest score for a class chooses the
            critical instance, for models that gather its query.
        scale: What the products are multiplied by; None: ``1 / sqrt(d)``.

    Source: Li, Li, Eliceiri, *Dual-stream Multiple Instance Learning*, CVPR 2021, eq. 3 and 4.
    """

    query: str
    classifier: str | None = None
    scale: float | None = None

    @property
    @override
    def path(self) -> str:
        return self.query

    @override
    def within(self, prefix: str) -> "CriticalInstanceSite":
        classifier = None if self.classifier is None else joined(prefix, self.classifier)
        return replace(self, query=joined(prefix, self.query), classifier=classifier)

    @override
    def find_block(self, root: nn.Module) -> nn.Module:
        return find_submodule(root, self.query)

    @override
    def watched(self, root: nn.Module) -> dict[str, nn.Module]:
        modules = {"query": find_submodule(root, self.query)}
        if self.classifier is not None:
            modules["classifier"] = find_submodule(root, self.classifier)
        return modules

    @override
    def read(self, calls: Sequence[ModuleCall], n_bags: int | None) -> list[RecordedAttention]:
        queries = [call for call in calls if call.name == "query"]
        choices = [call for call in calls if call.name == "classifier"]
        if self.classifier is None:
            queries, choices = queries[::2], queries[1::2]
        if len(queries) != len(choices):
            once = (
                f"be called once for each call of '{self.classifier}', or twice without classifier="
                if self.classifier is not None
                else "be called on the instances and on the critical ones, or name a classifier="
            )
            raise ValueError(
                f"'{self.query}' must {once}, but it was called "
                f"{len(queries) + (0 if self.classifier else len(choices))} times"
                f"{f', the classifier {len(choices)}' if self.classifier else ''}."
            )
        read = []
        for queried, chosen in zip(queries, choices, strict=True):
            (instances, *_), _ = queried.inputs()
            if self.classifier is None:
                (critical, *_), _ = chosen.inputs()
                scores = self._products(queried.output, chosen.output)
                read.append(RecordedAttention(scores, None, (instances, critical)))
            else:
                index = _batched(chosen.output).detach().argmax(dim=1)
                scores = self._products(queried.output, _gather(queried.output, index))
                read.append(RecordedAttention(scores, None, (instances, index)))
        return read

    @override
    def rescore(self, block: nn.Module, inputs: Any) -> Float[Tensor, "bag row instance"]:
        if self.classifier is None:
            instances, critical = inputs
            return self._products(block(instances), block(critical))
        # The model gathers these queries: so does its copy, in place of a second pass.
        instances, index = inputs
        queries = block(instances)
        return self._products(queries, _gather(queries, index))

    @override
    def instances(self, inputs: Any) -> Float[Tensor, "bag instance width"]:
        features, _ = inputs
        return _batched(features)

    def _products(self, queries: Tensor, critical: Tensor) -> Float[Tensor, "bag row instance"]:
        queries, critical = _batched(queries), _batched(critical)
        scale = 1 / math.sqrt(queries.shape[-1]) if self.scale is None else self.scale
        # In this order the gradient of the queries is contiguous.
        return (queries @ (critical * scale).mT).mT


def _batched(values: Tensor) -> Float[Tensor, "bag instance width"]:
    return values if values.ndim == 3 else values.unsqueeze(0)


def _gather(values: Tensor, index: Tensor) -> Float[Tensor, "bag cls width"]:
    """The entries of the chosen instances, (bag, class, width)."""
    values = _batched(values)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
