"""TransMIL: self-attention between instances by the Nystrom method (Shao et al., 2021)."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baselines.checks import check_bags, check_dropout, check_positive
from baselines.output import MILOutput

_PINV_ITERATIONS = 6
_RESIDUAL_KERNEL = 33


def pseudo_inverse(
    matrix: Float[Tensor, "bag head landmark landmark"], n_iterations: int
) -> Float[Tensor, "bag head landmark landmark"]:
    """Approximates the Moore-Penrose inverse by matrix products alone.

    ``Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4``, from ``Z = A^T / (|A|_1 |A|_inf)``.

    Source: Xiong et al., *Nystromformer*, AAAI 2021. One norm serves all heads of a bag, as in the
    implementation that TransMIL uses; there it serves the whole batch, so that the result of a bag
    depends on its neighbours.
    """
    magnitude = matrix.abs()
    norm_1 = magnitude.sum(dim=-2).amax(dim=(1, 2))
    norm_inf = magnitude.sum(dim=-1).amax(dim=(1, 2))
    inverse = matrix.mT / (norm_1 * norm_inf)[:, None, None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(n_iterations):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return inverse


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


class MixingRow(nn.Module):
    """Owns nothing; tells a forward hook by which weights a Nystrom layer mixes its class token."""

    def forward(
        self,
        to_landmarks: Float[Tensor, "bag head landmark"],
        inverse: Float[Tensor, "bag head landmark landmark"],
        from_landmarks: Float[Tensor, "bag head landmark token"],
    ) -> Float[Tensor, "bag head token-1"]:
        """Returns the class token's row of the product of the three, without the token itself.

        It is no distribution: weights may be negative and need not sum to one.
        """
        row: Tensor = (to_landmarks[:, :, None] @ inverse) @ from_landmarks[..., 1:]
        return row.squeeze(2)


class NystromAttention(nn.Module):
    """Self-attention in linear time, with a depth-wise convolution of the values added.

    Landmarks are means of consecutive queries and keys. With Q, K, V per head, landmarks Q~, K~ and
    S the softmax of scaled products: ``S(Q K~^T) pinv(S(Q~ K~^T)) S(Q~ K^T) V + conv(V)``.
    In evaluation mode the submodule ``mixing_row`` puts out the first row of what V is multiplied
    by, (bag, head, token - 1), for whoever hooks it.

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
        self.mixing_row = MixingRow()
        self.to_v = nn.Linear(width, width, bias=False)
        self.residual = nn.Conv2d(
            n_heads,
            n_heads,
            (_RESIDUAL_KERNEL, 1),
            padding=(_RESIDUAL_KERNEL // 2, 0),
            groups=n_heads,
            bias=False,
        )
        self.output = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, tokens: Float[Tensor, "bag token width"]) -> Float[Tensor, "bag token width"]:
        """Mixes the tokens of each bag."""
        n_tokens = tokens.shape[1]
        padded = F.pad(tokens, (0, 0, -n_tokens % self.n_landmarks, 0))
        queries, keys, values = (
            rearrange(project(padded), "b n (h d) -> b h n d", h=self.n_heads)
            for project in (self.query_key.to_q, self.query_key.to_k, self.to_v)
        )
        queries = queries / math.sqrt(queries.shape[-1])
        landmark_queries, landmark_keys = (
            reduce(x, "b h (m l) d -> b h m d", "mean", m=self.n_landmarks) for x in (queries, keys)
        )
        to_landmarks = (queries @ landmark_keys.mT).softmax(dim=-1)
        between_landmarks = (landmark_queries @ landmark_keys.mT).softmax(dim=-1)
        from_landmarks = (landmark_queries @ keys.mT).softmax(dim=-1)
        inverse = pseudo_inverse(between_landmarks, _PINV_ITERATIONS)
        if not self.training:
            # The tokens stand behind the padding, the class token first of them.
            self.mixing_row(to_landmarks[:, :, -n_tokens], inverse, from_landmarks[..., -n_tokens:])
        # From right to left: the tall factor meets a matrix as narrow as a head.
        mixed = to_landmarks @ (inverse @ (from_landmarks @ values)) + self.residual(values)
        output: Tensor = self.output(rearrange(mixed, "b h n d -> b n (h d)"))
        return output[:, -n_tokens:]


class TransLayer(nn.Module):
    """Residual attention over normalised tokens, ``x + attention(norm(x))``."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = NystromAttention(width, n_heads, dropout)

    def forward(
        self, tokens: Float[Tensor, "bag token width"]
    ) -> tuple[Float[Tensor, "bag token width"], Float[Tensor, "bag token width"]]:
        """Returns the new tokens, and the normalised ones that the attention has read."""
        normed = self.norm(tokens)
        return tokens + self.attention(normed), normed


class PPEG(nn.Module):
    """Pyramid position encoding: depth-wise convolutions over the square of instances."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
            for kernel in (7, 5, 3)
        )

    def forward(
        self, tokens: Float[Tensor, "bag token width"], side: int
    ) -> Float[Tensor, "bag token width"]:
        """Encodes all tokens but the first, the class token."""
        square = rearrange(tokens[:, 1:], "b (y x) w -> b w y x", y=side)
        encoded = square + sum(convolution(square) for convolution in self.convolutions)
        return torch.cat([tokens[:, :1], rearrange(encoded, "b w y x -> b (y x) w")], dim=1)


class TransMIL(nn.Module):
    """Classifies a class token that two Nystrom attention layers mix with the instances.

    Projection and ReLU; the first instances are repeated until their number is a square; class
    token in front; attention, PPEG, attention; layer norm and a linear layer on the class token.

    ``scores`` are the exact products of the class token's query with the instances' keys in the
    last layer, one row per head. The model never takes their softmax: its Nystrom attention has no
    row that is a distribution. They are the nearest thing to one, and a surrogate.

    The attention block is the submodule ``layers.1.attention.query_key``: normalised tokens
    (1, 1 + instance, hidden) of one bag, class token first and no padding or repeats, to raw scores
    (1, row, instance). It is called once per bag. What the model really mixes with shows, in
    evaluation mode, in the output of ``layers.1.attention.mixing_row``: (1, row, instance +
    repeats).

    Args:
        in_features: Width of the instance features.
        n_classes: Number of classes.
        hidden: Width of the tokens; half of it is the number of landmarks.
        n_heads: Number of heads.
        dropout: Dropout after each attention layer.

    Raises:
        ValueError: A count is not positive, ``n_heads`` does not divide ``hidden``, ``hidden`` is
            below 2, or ``dropout`` lies outside [0, 1).

    Example:
        >>> import torch
        >>> output = TransMIL(6, 2, hidden=16)(torch.randn(1, 5, 6))
        >>> output.logits.shape, output.scores.shape
        (torch.Size([1, 2]), torch.Size([1, 8, 5]))

    Source: Shao, Bian, Chen, Wang, Zhang, Ji, Zhang, *TransMIL: Transformer based Correlated
    Multiple Instance Learning for Whole Slide Image Classification*, NeurIPS 2021. Differences from
    the authors' code:

    - the class token follows the model's device; upstream moves it to the first GPU;
    - the pseudo-inverse is scaled per bag (see `pseudo_inverse`), and padded batches run bag by
      bag, so that no bag depends on another or on padding; upstream takes bags of equal size;
    - query, key and value are three layers and not one, so that a block owns just what scores;
    - products run from right to left: the same result for fewer operations;
    - widths and heads are arguments; upstream fixes 1024, 512 and 8;
    - returns logits and scores; upstream adds probabilities and the predicted class.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        hidden: int = 512,
        n_heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, n_classes=n_classes, hidden=hidden, n_heads=n_heads)
        check_dropout(dropout)
        if hidden < 2 or hidden % n_heads:
            raise ValueError(
                f"hidden must be at least 2 and a multiple of n_heads={n_heads}, but got {hidden}. "
                "Change one of the two."
            )
        self.in_features = in_features
        self.n_heads = n_heads
        self.projection = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.reset_parameters()
        self.layers = nn.ModuleList(TransLayer(hidden, n_heads, dropout) for _ in range(2))
        self.position = PPEG(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, n_classes)

    def reset_parameters(self) -> None:
        """Draws a new class token; the other parts have such a method of their own."""
        nn.init.normal_(self.class_token)

    def forward(
        self,
        features: Float[Tensor, "bag instance width"],
        mask: Bool[Tensor, "bag instance"] | None = None,
        label: Int[Tensor, " bag"] | None = None,  # noqa: ARG002 (all baselines are called alike)
    ) -> MILOutput:
        """Classifies a batch of bags; True in the mask marks a real instance.

        Raises:
            ValueError: A bag has no real instance, or the features have another width.
        """
        mask = check_bags("TransMIL", self.in_features, features, mask)
        logits, scores = [], []
        for bag, real in zip(features, mask, strict=True):
            bag_logits, bag_scores = self._classify(bag[real][None])
            logits.append(bag_logits)
            padded_scores = bag_scores.new_full((1, self.n_heads, len(real)), -torch.inf)
            padded_scores[..., real] = bag_scores
            scores.append(padded_scores)
        return MILOutput(torch.cat(logits), torch.cat(scores))

    def _classify(
        self, features: Float[Tensor, "1 instance width"]
    ) -> tuple[Float[Tensor, "1 cls"], Float[Tensor, "1 head instance"]]:
        n_instances = features.shape[1]
        side = math.isqrt(n_instances - 1) + 1
        instances = self.projection(features)
        repeats = instances[:, : side**2 - n_instances]
        tokens = torch.cat([self.class_token, instances, repeats], dim=1)

        tokens, _ = self.layers[0](tokens)
        tokens, normed = self.layers[1](self.position(tokens, side))
        query_key = self.get_submodule("layers.1.attention.query_key")
        scores = query_key(normed[:, : 1 + n_instances])
        return self.head(self.norm(tokens[:, 0])), scores
