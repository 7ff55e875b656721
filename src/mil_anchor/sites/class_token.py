"""The class token's row of self-attention, from a projection to queries, keys and values."""

import math
from typing import TypeGuard

import torch.nn.functional as F
import torch.nn.modules.module as hooks_of_all
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mil_anchor.sites.base import PassiveHook


def row_of(
    qkv: Float[Tensor, "bag token width"], *, n_heads: int
) -> Float[Tensor, "bag row instance"]:
    """``q_h . k_hi / sqrt(d)`` of the first token with all others, one row per head.

    Args:
        qkv: ``q | k | v``, each ``(head d)``, of the class token and the instances.
        n_heads: Number of heads.
    """
    query, keys, _ = (rearrange(x, "b n (h d) -> b h n d", h=n_heads) for x in qkv.chunk(3, dim=-1))
    return (query[:, :, :1] @ keys[:, :, 1:].mT).squeeze(-2) / math.sqrt(query.shape[-1])


def row_without_keys(
    qkv: nn.Linear, features: Float[Tensor, "bag token width"], tokens: slice, *, n_heads: int
) -> Float[Tensor, "bag row instance"]:
    """`row_of` what a plain projection puts out for these tokens, for far fewer products.

    ``q . (W_k x + b_k) = (W_k^T q) . x + q . b_k``: one direction per head meets the features, and
    no key is computed. No gradient is a slice of the projection's output, filled up with zeros.

    Args:
        qkv: The projection; see `is_plain_linear`.
        features: Its input.
        tokens: The class token and the instances behind it.
        n_heads: Number of heads.
    """
    # A model may have opened an autocast of its own, which is over now.
    w_q, w_k, _ = qkv.weight.to(features.dtype).chunk(3)
    b_q, b_k, _ = (None,) * 3 if qkv.bias is None else qkv.bias.to(features.dtype).chunk(3)
    token = features[:, tokens.start : tokens.start + 1]
    query = rearrange(F.linear(token, w_q, b_q), "b 1 (h d) -> b h 1 d", h=n_heads)
    query = query / math.sqrt(query.shape[-1])
    direction = query @ rearrange(w_k, "(h d) w -> h d w", h=n_heads)
    # All tokens, and the few scores are cut: a slice of the features would be a copy of them here
    # or in the backward pass. In this order of factors their gradient is contiguous.
    scores = (features @ direction.squeeze(2).mT).mT[..., tokens.start + 1 : tokens.stop]
    if b_k is None:
        return scores
    return scores + (query @ rearrange(b_k, "(h d) -> h d 1", h=n_heads)).squeeze(-1)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a call of the module gives ``x W^T + b`` and nothing changes it.

    A subclass (LoRA, quantised weights, parametrizations) may compute anything, and so may a hook.
    """
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *hooks_of_all._global_forward_hooks.values(),
        *hooks_of_all._global_forward_pre_hooks.values(),
    )
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and all(isinstance(hook, PassiveHook) for hook in hooks)
    )
