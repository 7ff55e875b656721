"""Sites whose scores are query-key products of self-attention: class tokens, multi-head rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from mil_anchor.sites.base import (
    ModuleCall,
    RecordedAttention,
    Site,
    describe,
    find_submodule,
    joined,
)
from mil_anchor.sites.class_token import is_plain_linear, row_of, row_without_keys
from mil_anchor.sites.running import run_until


@dataclass(frozen=True)
class ClassTokenSite(Site):
    """The class token's row of a self-attention with one fused query-key-value projection.

    The scores of head h are ``q_h . k_hi / sqrt(d)`` of the class token with each real instance.
    TransMIL's Nystrom attention has no row that is a distribution over instances; this is a
    surrogate for what it mixes with (it holds W_q, W_k and the class token). The tokens are the
    class token, the instances, and with ``squared`` repeats of the first instances; zeros in front
    of them, which Nystrom attention adds, are left out, and so are the repeats.

    Args:
        qkv: Path of the projection, whose output is ``q | k | v``, each ``(head d)``. Its parent is
            the attention module: the axis before the last of its input counts the tokens.
        heads: Number of heads. None: the parent's ``heads``, ``n_heads`` or ``num_heads``.
        squared: Whether the instances were repeated up to a square number (TransMIL).
        model: Path of the model, whose input counts the instances (or that of its first submodule
            that runs); only used with ``squared``.

    Source: Shao et al., *TransMIL*, NeurIPS 2021.
    """

    qkv: str
    heads: int | None = None
    squared: bool = True
    model: str = ""

    @property
    @override
    def path(self) -> str:
        return self.qkv

    @property
    @override
    def n_class_tokens(self) -> int:
        return 1

    @property
    @override
    def must_be_proven(self) -> bool:
        return False

    @override
    def within(self, prefix: str) -> "ClassTokenSite":
        return replace(self, qkv=joined(prefix, self.qkv), model=joined(prefix, self.model))

    @override
    def bound(self, root: nn.Module) -> "ClassTokenSite":
        if self.heads is not None:
            return self
        parent = find_submodule(root, self.qkv.rpartition(".")[0])
        for name in ("heads", "n_heads", "num_heads"):
            if isinstance(getattr(parent, name, None), int):
                return replace(self, heads=getattr(parent, name))
        raise ValueError(
            f"The number of heads of '{self.qkv}' must be known, but {type(parent).__name__} has "
            f"no heads, n_heads or num_heads. Write ClassTokenSite('{self.qkv}', heads=...)."
        )

    @override
    def find_block(self, root: nn.Module) -> nn.Module:
        return find_submodule(root, self.qkv)

    @override
    def watched(self, root: nn.Module) -> dict[str, nn.Module]:
        modules = {"qkv": find_submodule(root, self.qkv)}
        modules["attention"] = find_submodule(root, self.qkv.rpartition(".")[0])
        if self.squared:
            model = find_submodule(root, self.model)
            modules |= {f"model.{name}": child for name, child in model.named_children()}
            # Wrappers that call its forward run the model without its hooks.
            modules["model"] = model
        return modules

    @override
    def read(self, calls: Sequence[ModuleCall], n_bags: int | None) -> list[RecordedAttention]:
        projections = [call for call in calls if call.name == "qkv"]
        attentions = [call for call in calls if call.name == "attention"]
        counts = self._counts(calls, [_length(call.features, 1) for call in attentions])
        if not len(projections) == len(attentions) == len(counts):
            raise ValueError(
                f"Each call of '{self.qkv}' must belong to one of its parent and of the model, but "
                f"they ran {len(projections)}, {len(attentions)} and {len(counts)} times."
            )
        read = []
        for projection, (n_tokens, n_instances) in zip(projections, counts, strict=True):
            output, (args, _) = projection.output, projection.inputs()
            first = output.shape[1] - n_tokens
            tokens = slice(first, first + 1 + n_instances)
            features = projection.features  # with their graph
            if features is not None and is_plain_linear(projection.module):
                scores = row_without_keys(projection.module, features, tokens, n_heads=self._heads)
            else:
                scores = row_of(output[:, tokens], n_heads=self._heads)
            read.append(RecordedAttention(scores, None, (args, tokens)))
        return read

    @override
    def rescore(self, block: nn.Module, inputs: Any) -> Float[Tensor, "bag row instance"]:
        (features, *_), tokens = inputs
        if is_plain_linear(block):
            return row_without_keys(block, features, tokens, n_heads=self._heads)
        return row_of(block(features[:, tokens]), n_heads=self._heads)

    @override
    def reads_output(self, name: str) -> bool:
        return name == "qkv"

    @override
    def instances(self, inputs: Any) -> Float[Tensor, "bag instance width"]:
        (features, *_), tokens = inputs
        instances: Tensor = features[:, tokens][:, 1:]
        return instances

    @property
    def _heads(self) -> int:
        if self.heads is None:
            raise ValueError(
                f"The number of heads of '{self.qkv}' must be known here. Use the site that "
                "ClassTokenSite.bound gives, or write heads=."
            )
        return self.heads

    def _counts(
        self, calls: Sequence[ModuleCall], n_tokens: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Of each call, the tokens before padding and the real instances among them."""
        if not self.squared:
            return [(n, n - 1) for n in n_tokens]
        inputs = [call for call in calls if call.name == "model"]
        if not inputs:
            first = next((call.name for call in calls if call.name.startswith("model.")), None)
            inputs = [call for call in calls if call.name == first]
        n_instances = [_length(call.features, 1) for call in inputs]
        for tokens, instances in zip(n_tokens, n_instances, strict=False):
            if tokens != (math.isqrt(instances - 1) + 1) ** 2 + 1:
                raise ValueError(
                    f"'{self.qkv}' must get a class token and the instances repeated up to a "
                    f"square number, but it got {tokens} tokens for {instances} instances. Use "
                    f"ClassTokenSite('{self.qkv}', squared=False) if none are repeated."
                )
        return list(zip(n_tokens, n_instances, strict=False))


@dataclass(frozen=True)
class MultiheadSite(Site):
    """Rows of an ``nn.MultiheadAttention``: ``q_h . k_hi / sqrt(d)``, one row per head and query.

    Args:
        block: Path of the submodule to mirror: the attention itself, or one that projects its
            inputs first.
        tap: Path below the block of the ``nn.MultiheadAttention``; empty: the block is it.
        class_token: The instances attend to each other behind a class token: only its row counts,
            and its own key does not. Otherwise every query (a learned seed) is a row.

    Source: Vaswani et al., *Attention Is All You Need*, NeurIPS 2017, eq. 1.
    """

    block: str
    tap: str = ""
    class_token: bool = False

    @property
    @override
    def path(self) -> str:
        return self.block

    @property
    @override
    def n_class_tokens(self) -> int:
        return int(self.class_token)

    @override
    def within(self, prefix: str) -> "MultiheadSite":
        return replace(self, block=joined(prefix, self.block))

    @override
    def find_block(self, root: nn.Module) -> nn.Module:
        return find_submodule(root, self.block)

    @override
    def watched(self, root: nn.Module) -> dict[str, nn.Module]:
        block = self.find_block(root)
        attention = find_submodule(block, self.tap)
        if not isinstance(attention, nn.MultiheadAttention):
            raise ValueError(
                f"'{joined(self.block, self.tap)}' must be an nn.MultiheadAttention, but it is a "
                f"{type(attention).__name__}. Name the attention with MultiheadSite(block, tap=)."
            )
        return {"attention": attention} | ({"block": block} if self.tap else {})

    @override
    def read(self, calls: Sequence[ModuleCall], n_bags: int | None) -> list[RecordedAttention]:
        attentions = [call for call in calls if call.name == "attention"]
        blocks = [call for call in calls if call.name == "block"] if self.tap else attentions
        if len(blocks) != len(attentions):
            raise ValueError(
                f"'{self.tap}' must run once in each call of '{self.block}', but they ran "
                f"{len(attentions)} and {len(blocks)} times. Name the block that runs it."
            )
        return [
            RecordedAttention(
                self._scores(attention),
                self._mask(attention),
                (*block.inputs(), bool(getattr(attention.module, "batch_first", False))),
            )
            for attention, block in zip(attentions, blocks, strict=True)
        ]

    @override
    def rescore(self, block: nn.Module, inputs: Any) -> Float[Tensor, "bag row instance"]:
        args, kwargs, _ = inputs
        if not self.tap:
            return self._scores(ModuleCall("", block, args, kwargs, None))
        attention = {"attention": find_submodule(block, self.tap)}
        (call,) = run_until(block, attention, args, kwargs, n_calls=1)
        return self._scores(call)

    @override
    def reads_output(self, name: str) -> bool:
        return False

    @override
    def instances(self, inputs: Any) -> Float[Tensor, "bag instance width"]:
        """The keys, without that of a class token.

        Raises:
            ValueError: The block makes the keys itself.
        """
        if self.tap:
            raise ValueError(
                f"The features that '{self.block}' weighs must be its keys, but these are made "
                f"inside it for '{self.tap}'. Name the attention itself, as in "
                f"MultiheadSite('{joined(self.block, self.tap)}')."
            )
        args, kwargs, batch_first = inputs
        _, keys = _queries_and_keys(args, kwargs, batch_first=batch_first)
        return keys[:, 1:] if self.class_token else keys

    def _scores(self, call: ModuleCall) -> Float[Tensor, "bag row instance"]:
        attention = call.module
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"Expected an nn.MultiheadAttention, but got {describe(attention)}.")
        batch_first = bool(attention.batch_first)
        queries, keys = _queries_and_keys(call.args, call.kwargs, batch_first=batch_first)
        if self.class_token:
            queries, keys = queries[:, :1], keys[:, 1:]
        if attention.in_proj_weight is None:
            weights = attention.q_proj_weight, attention.k_proj_weight
        else:
            weights = attention.in_proj_weight.chunk(3)[:2]
        bias = attention.in_proj_bias
        biases = (None, None) if bias is None else bias.chunk(3)[:2]
        q, k = (
            rearrange(F.linear(x.to(w.dtype), w, b), "b n (h d) -> b h n d", h=attention.num_heads)
            for x, w, b in zip((queries, keys), weights, biases, strict=True)
        )
        return rearrange(q @ k.mT / math.sqrt(q.shape[-1]), "b h q n -> b (h q) n")

    def _mask(self, call: ModuleCall) -> Bool[Tensor, "bag instance"] | None:
        key = dict(enumerate(call.args)).get(1, call.kwargs.get("key"))
        if isinstance(key, Tensor) and key.is_nested:
            lengths = torch.tensor([len(bag) for bag in key.unbind()], device=key.device)
            nested = torch.arange(int(lengths.max()), device=key.device) < lengths[:, None]
            return nested[:, 1:] if self.class_token else nested
        padding = dict(enumerate(call.args)).get(3, call.kwargs.get("key_padding_mask"))
        if padding is None:
            return None
        # True, or -inf in a mask of floats, is padding here.
        mask: Tensor = ~padding if padding.dtype == torch.bool else padding == 0
        mask = mask.reshape(-1, mask.shape[-1])
        return mask[:, 1:] if self.class_token else mask


def _queries_and_keys(
    args: Any, kwargs: dict[str, Any], *, batch_first: bool
) -> tuple[Tensor, Tensor]:
    given = dict(zip(("query", "key"), args, strict=False)) | kwargs
    return (
        _as_batch(given["query"], batch_first=batch_first),
        _as_batch(given["key"], batch_first=batch_first),
    )


def _as_batch(tokens: Tensor, *, batch_first: bool) -> Tensor:
    if tokens.is_nested:  # an nn.TransformerEncoder in evaluation leaves padding out
        return tokens.to_padded_tensor(0.0)
    if tokens.ndim == 2:
        return tokens.unsqueeze(0)
    return tokens if batch_first else tokens.transpose(0, 1)


def _length(features: Tensor | None, axis: int) -> int:
    """Instances of bags (bag, instance, ...) or of one bag (instance, width)."""
    if features is None or features.ndim < 2:
        raise ValueError(
            "The model's input must have the shape (bag, instance, ...) or (instance, width), but "
            f"it is {describe(features)}."
        )
    return features.shape[axis] if features.ndim > 2 else features.shape[0]
