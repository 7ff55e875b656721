"""Self-attention in linear time by the Nystrom method (Xiong et al., 2021)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from baselines.backward import once_differentiable
from baselines.depthwise import depthwise_convolution
from baselines.fused import can_fuse

_PINV_ITERATIONS = 6
_RESIDUAL_KERNEL = 33


def pseudo_inverse_times(
    matrix: Float[Tensor, "bag head landmark landmark"],
    columns: Float[Tensor, "bag head landmark column"],
    n_iterations: int,
    *,
    transposed: bool = False,
) -> Float[Tensor, "bag head landmark column"]:
    """Multiplies columns by an approximate Moore-Penrose inverse, made of matrix products alone.

    The inverse is the last of ``Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4``, from
    ``Z_0 = A^T / (|A|_1 |A|_inf)``. With ``P = A Z`` one such step reads
    ``Z <- Z (13 I - 15 P + P^2 (7 I - P)) / 4`` and ``P <- (13 P - 15 P^2 + P^2 (7 P - P^2)) / 4``:
    two products of matrices instead of four, and Z itself is never formed. All P are symmetric and
    commute, so that the columns may meet them in any order, for the transposed inverse as well.
    P keeps its small eigenvalues in float32, which ``I - P`` would lose.

    Args:
        matrix: A.
        columns: What the inverse is multiplied by, from the left.
        n_iterations: Number of steps.
        transposed: Whether to multiply by the transposed inverse.

    Source: Xiong et al., *Nystromformer*, AAAI 2021. One norm serves all heads of a bag, as in the
    implementation that TransMIL uses; there it serves the whole batch, so that the result of a bag
    depends on its neighbours.
    """
    # Half precision would lose the small eigenvalues.
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    with torch.autocast(matrix.device.type, enabled=False):
        product = _pseudo_inverse_times(
            matrix.to(dtype), columns.to(dtype), n_iterations, transposed
        )
    return product.to(columns.dtype)


class QueryKey(nn.Module):
    """Owns the query and key projections of an attention layer and reads the class token's row.

    Args:
        width: Width of the tokens.
        n_heads: Number of heads.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)

    def forward(
        self, tokens: Float[Tensor, "bag token width"]
    ) -> Float[Tensor, "bag head token-1"]:
        """Returns ``q^T k_i / sqrt(d)`` of the first token, the class token, with all others."""
        queries: Tensor = rearrange(
            self.to_q(tokens[:, :1]), "b 1 (h d) -> b h 1 d", h=self.n_heads
        )
        key_weight = rearrange(self.to_k.weight, "(h d) w -> h d w", h=self.n_heads)
        # q^T (W x) = (W^T q)^T x: one row per head meets the tokens, and no key is computed.
        directions = rearrange(queries @ key_weight, "b h 1 w -> b w h")
        scores = rearrange(tokens[:, 1:] @ directions, "b n h -> b h n")
        return scores / math.sqrt(queries.shape[-1])


class ResidualConvolution(nn.Conv2d):
    """Slides one kernel per head along the tokens.

    Args:
        n_heads: Number of heads.
    """

    def __init__(self, n_heads: int) -> None:
        kernel = (_RESIDUAL_KERNEL, 1)
        padding = (_RESIDUAL_KERNEL // 2, 0)
        super().__init__(n_heads, n_heads, kernel, padding=padding, groups=n_heads, bias=False)

    @override
    def forward(
        self, values: Float[Tensor, "bag head token width"]
    ) -> Float[Tensor, "bag head token width"]:
        # Heads side by side, as the projection leaves them, are the channels of an image one pixel
        # wide: channels of their own are what the libraries convolve fast, and this order of axes
        # is what they recognise as channels last and do not copy.
        rows = rearrange(values, "b h n d -> b n (h d)")
        channels = rows[:, :, None].permute(0, 3, 1, 2)
        kernels = self.weight.repeat_interleave(values.shape[-1], dim=0)
        convolved = depthwise_convolution(channels, kernels)
        return rearrange(convolved, "b (h d) n 1 -> b h n d", h=values.shape[1])


class NystromAttention(nn.Module):
    """Self-attention in linear time, with a depth-wise convolution of the values added.

    Landmarks are means of consecutive queries and keys. With Q, K, V per head, landmarks Q~, K~ and
    S the softmax of scaled products: ``S(Q K~^T) pinv(S(Q~ K~^T)) S(Q~ K^T) V + conv(V)``.

    Args:
        width: Width of the tokens.
        n_heads: Number of heads.
        dropout: Dropout after the output projection.

    Source: Xiong et al., *Nystromformer: A Nystrom-based Algorithm for Approximating
    Self-Attention*, AAAI 2021, with half as many landmarks as the tokens are wide and zeros in
    front of a sequence that does not divide into them, as TransMIL uses it.
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_landmarks = width // 2
        self.query_key = QueryKey(width, n_heads)
        self.to_v = nn.Linear(width, width, bias=False)
        self.residual = ResidualConvolution(n_heads)
        self.output = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, tokens: Float[Tensor, "bag token width"]) -> Float[Tensor, "bag mixed width"]:
        """Mixes the tokens of each bag."""
        queries, keys, values = (
            self._heads(project(tokens))
            for project in (self.query_key.to_q, self.query_key.to_k, self.to_v)
        )
        landmark_queries, landmark_keys = self._landmarks(tokens)
        # From right to left: each tall factor meets a matrix as narrow as a head. Both softmaxes
        # are taken inside the product, so that no matrix of tokens by landmarks is kept.
        padded = self._padded(values)
        gathered = F.scaled_dot_product_attention(landmark_queries, self._padded(keys), padded)
        inverted = pseudo_inverse_times(
            _softmax_of_products(landmark_queries, landmark_keys), gathered, _PINV_ITERATIONS
        )
        mixed = F.scaled_dot_product_attention(queries, landmark_keys, inverted)
        # The zeros in front are those that the convolution sees anyway; the values without them
        # need not be kept as well.
        mixed = mixed + self.residual(padded)[..., -tokens.shape[1] :, :]
        output: Tensor = self.output(rearrange(mixed, "b h n d -> b n (h d)"))
        return output

    def _heads(self, rows: Tensor) -> Tensor:
        heads: Tensor = rearrange(rows, "b n (h d) -> b h n d", h=self.n_heads)
        return heads

    def _padded(self, rows: Tensor) -> Tensor:
        # A token of zeros has zeros for key and value: no projection has a bias.
        return F.pad(rows, (0, 0, -rows.shape[-2] % self.n_landmarks, 0))

    def _landmarks(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # The mean of projected tokens is the projection of their mean.
        groups = rearrange(self._padded(tokens), "b (m l) w -> b m l w", m=self.n_landmarks)
        means = groups.mean(dim=2)
        return self._heads(self.query_key.to_q(means)), self._heads(self.query_key.to_k(means))


class ClassTokenAttention(NystromAttention):
    """The first row of a `NystromAttention`, for a last layer that reads its class token alone.

    The same parameters and the same numbers: only the class token has a query, and its row of what
    the values are multiplied by, ``s pinv(S(Q~ K~^T)) S(Q~ K^T)`` with s its row of ``S(Q K~^T)``
    and the convolution's kernel added, meets the tokens themselves; the few pooled tokens are then
    projected to values. In evaluation mode the submodule ``mixing_row`` puts out that row without
    the convolution and the class token, (bag, head, token - 1), for whoever hooks it. It is no
    distribution: weights may be negative and need not sum to one.
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__(width, n_heads, dropout)
        self.mixing_row = nn.Identity()

    @override
    def forward(self, tokens: Float[Tensor, "bag token width"]) -> Float[Tensor, "bag mixed width"]:
        """Returns the class token, the first, mixed with the others of its bag: (bag, 1, width)."""
        query = self._heads(self.query_key.to_q(tokens[:, :1]))
        keys = self._padded(self._heads(self.query_key.to_k(tokens)))
        landmark_queries, landmark_keys = self._landmarks(tokens)
        inverted = pseudo_inverse_times(
            _softmax_of_products(landmark_queries, landmark_keys),
            _softmax_of_products(query, landmark_keys).mT,
            _PINV_ITERATIONS,
            transposed=True,
        )
        scaled_queries = landmark_queries / math.sqrt(query.shape[-1])
        row = self._mixture(inverted.squeeze(-1), scaled_queries, keys)[..., -tokens.shape[1] :]
        if not self.training:
            self.mixing_row(row[..., 1:])
        pooled = (row + self._convolution_row(tokens.shape[1])) @ tokens
        # Each head keeps its own part of the projected tokens that it has pooled.
        values = torch.diagonal(self._heads(self.to_v(pooled)), dim1=1, dim2=2)
        output: Tensor = self.output(rearrange(values, "b d h -> b 1 (h d)"))
        return output

    def _mixture(self, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        if can_fuse(keys):
            flat = (x.flatten(0, 1) for x in (weights, queries, keys))
            mixture: Tensor = _SoftmaxMixture.apply(*flat)  # type: ignore[no-untyped-call]
            return mixture.view(*keys.shape[:3])
        return (weights[:, :, None] @ (queries @ keys.mT).softmax(dim=-1)).squeeze(2)

    def _convolution_row(self, n_tokens: int) -> Tensor:
        """What the convolution adds to the class token's row: the kernel from its middle on."""
        kernel = self.residual.weight[:, 0, _RESIDUAL_KERNEL // 2 :, 0]
        return F.pad(kernel, (0, n_tokens - kernel.shape[1]))


def _pseudo_inverse_times(
    matrix: Tensor,
    columns: Tensor,
    n_iterations: int,
    transposed: bool,  # noqa: FBT001
) -> Tensor:
    magnitude = matrix.abs()
    norm_1 = magnitude.sum(dim=-2).amax(dim=(1, 2))
    norm_inf = magnitude.sum(dim=-1).amax(dim=(1, 2))
    start = (matrix.mT / (norm_1 * norm_inf)[:, None, None, None]).flatten(0, 1)
    power = matrix.flatten(0, 1) @ start
    product = columns.flatten(0, 1)
    if transposed:
        product = start.mT @ product
    for index in range(n_iterations):
        once = power @ product
        if index == n_iterations - 1:
            # Here the square would be more work than a third product with the columns.
            twice = power @ (power @ (7 * product - once))
        else:
            square = power @ power
            twice = square @ (7 * product - once)
            power = (13 * power - 15 * square).baddbmm_(square, 7 * power - square) / 4
        product = (13 * product - 15 * once + twice) / 4
    return (product if transposed else start @ product).view_as(columns)


def _softmax_of_products(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.mT / math.sqrt(queries.shape[-1])).softmax(dim=-1)


class _SoftmaxMixture(torch.autograd.Function):
    """``sum_j w_j softmax(Q K^T)_j``, head by head, computed again backwards instead of kept."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        mixtures, norms = [], []
        for w, q, k in zip(weights, queries, keys, strict=True):
            products = q @ k.t()
            norms.append(products.logsumexp(dim=-1, keepdim=True))
            mixtures.append(w @ products.sub_(norms[-1]).exp_())
        ctx.save_for_backward(weights, queries, keys, torch.stack(norms))
        return torch.stack(mixtures)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, queries, keys, norms = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (weights, queries, keys)]
        for w, q, k, norm, g, *(grad_w, grad_q, grad_k) in zip(
            weights, queries, keys, norms, grad, *grads, strict=True
        ):
            attention = (q @ k.t()).sub_(norm).exp_()
            torch.mv(attention, g, out=grad_w)
            # The gradient of the products, but for a factor w_j on each row, which is left to the
            # narrow factors.
            centred = (g - grad_w[:, None]).mul_(attention)
            torch.mul(centred @ k, w[:, None], out=grad_q)
            torch.mm(centred.t(), w[:, None] * q, out=grad_k)
        return grads[0], grads[1], grads[2]
