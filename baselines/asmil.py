"""ASMIL: FEAT tokens attend to the tiles, and a class token reads those kept (2026)."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baselines.checks import check_bags, check_choice, check_dropout, check_positive
from baselines.normalization import normalized_scorer, scorer_inputs
from baselines.output import MILOutput
from baselines.pooling import attention_pool, mask_scores


class FeatScorer(nn.Module):
    """Scores each instance h for each FEAT token f and head, ``(Q f)^T (K h) / sqrt(d)``.

    It owns the trainable tokens f and the matrices Q and K of each head: all that makes the scores.

    Args:
        width: Width of instances and tokens; d is this divided by the heads.
        n_heads: Number of heads.
        n_tokens: Number of FEAT tokens.
        n_blocks: 1: all tokens share Q and K; ``n_tokens``: each has its own.
    """

    def __init__(self, width: int, n_heads: int, *, n_tokens: int, n_blocks: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.tokens = nn.Parameter(torch.empty(n_tokens, width))
        self.query = nn.Parameter(torch.empty(n_blocks, width, width))
        self.key = nn.Parameter(torch.empty(n_blocks, width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new tokens and maps."""
        nn.init.normal_(self.tokens)
        _start_maps(self.query, self.key)

    def forward(
        self, instances: Float[Tensor, "bag instance width"]
    ) -> Float[Tensor, "bag instance row"]:
        """Returns raw scores: token by token, and of each token head by head."""
        # An axis of one block broadcasts over the tokens.
        queries = torch.einsum("tw,tqw->tq", self.tokens, self.query)
        queries = rearrange(queries, "t (h d) -> t h d", h=self.n_heads)
        key = rearrange(self.key, "t (h d) w -> t h d w", h=self.n_heads)
        # q^T (K h) = (K^T q)^T h: one direction per row meets the instances, no key is computed.
        directions = torch.einsum("thd,thdw->wth", queries, key)
        return instances @ directions.flatten(1) / math.sqrt(queries.shape[-1])


class FeatReadout(nn.Module):
    """Makes the FEAT tokens from what their heads have pooled: value, output map, layer norm.

    Args:
        width: Width of instances and tokens.
        n_heads: Number of heads.
        n_blocks: As for `FeatScorer`.
    """

    def __init__(self, width: int, n_heads: int, *, n_blocks: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.value = nn.Parameter(torch.empty(n_blocks, width, width))
        self.output = nn.Parameter(torch.empty(n_blocks, width, width))
        self.norm = nn.LayerNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new maps."""
        _start_maps(self.value, self.output)

    def forward(self, pooled: Float[Tensor, "bag row width"]) -> Float[Tensor, "bag token width"]:
        """Takes the attention-weighted mean of the instances for each token and head."""
        # The mean of the values is the value of the mean: it is computed once per row.
        pooled = rearrange(pooled, "b (t h) w -> b t h w", h=self.n_heads)
        value = rearrange(self.value, "t (h d) w -> t h d w", h=self.n_heads)
        heads = torch.einsum("bthw,thdw->bthd", pooled, value).flatten(2)
        tokens: Tensor = self.norm(torch.einsum("btv,twv->btw", heads, self.output))
        return tokens


class ASMIL(nn.Module):
    """Pools the bag with FEAT tokens, drops some of them in training, and classifies the rest.

    Projection and ReLU; each trainable FEAT token attends to the tiles with several heads, row
    ``(token, head)`` of the attention being ``softmax_i((Q f)^T (K h_i) / sqrt(d))``; value, output
    map and layer norm make the token's new content; a trainable class token attends to itself and
    to the FEAT tokens; layer norm and a linear layer on the class token.

    In training mode each FEAT token of a bag is hidden from the class token with probability B, at
    least one stays, and the rest share the attention; in evaluation mode all are there. ``scores``
    hold the rows of all FEAT tokens, dropped or not, token by token and head by head. The paper's
    heat map of a tile is the mean over tokens and heads of its attention: over the rows, then.

    The attention block is the submodule ``attention``: projected instances (bag, instance, hidden)
    to raw scores (bag, instance, row). It owns the FEAT tokens and the query and key maps. With
    `AnchorCallback`, whose KL then acts on these rows, the model is the paper's full method.

    Args:
        in_features: Width of the instance features.
        n_classes: Number of classes.
        hidden: Width of projected instances and tokens.
        n_tokens: Number of FEAT tokens (the paper: 8; 16 on CAMELYON17).
        n_heads: Heads of either attention.
        drop_rate: Probability B of dropping a FEAT token, or the share that is dropped.
        drop: ``"bernoulli"``: independently of each other, and where that would drop all, one drawn
            evenly stays; ``"count"``: always ``round(drop_rate * n_tokens)``, all but one at most.
        token_blocks: ``"shared"``: one set of query, key, value and output maps for all FEAT
            tokens; ``"per_token"``: each has its own.
        normalization: How scores become attention: ``"softmax"``, ``"nsf"`` or ``"mixture"``; see
            `normalized_scorer`.

    Raises:
        ValueError: A count is not positive, ``n_heads`` does not divide ``hidden``, ``drop_rate``
            lies outside [0, 1), or another choice is unknown.

    Example:
        >>> import torch
        >>> output = ASMIL(6, 2, hidden=16, n_tokens=4)(torch.randn(1, 5, 6))
        >>> output.logits.shape, output.scores.shape
        (torch.Size([1, 2]), torch.Size([1, 32, 5]))

    Source: *ASMIL* (arXiv 2603.06658, ICLR 2026). The paper speaks of one shared encoder over FEAT
    tokens and tiles, its code has one attention block per token. Shared is the default: it is the
    published text, and its size does not grow with the number of tokens. Differences from the
    paper:

    - the tiles alone are keys of a FEAT token, not the other FEAT tokens: a row is then a
      distribution over the tiles, which is what eq. 2, 3 and 7 are about, and the tokens meet in
      the second attention. Rows of tiles, which would be thrown away, are not computed;
    - where the paper leaves the layers open: no feed-forward layers, no position encoding, no
      dropout beside that of tokens; a residual around the second attention only;
    - the anchor and its loss are not in here: `AnchorCallback` brings them.

    Differences from the released code (commit 5d06227) that ``experiment=asmil_as_released`` undoes
    as far as they matter:

    - dropping is Bernoulli, as in the paper; the code drops a fixed count (``drop="count"``);
    - blocks are shared (``token_blocks="per_token"``);
    - the anchor is a copy that follows the model by EMA; the code's is a second random
      initialisation that never moves and has a projection of its own;
    - the divergence is eq. 7, summed over tiles, with a weight and no temperature; the code
      averages over tiles, which divides it by their number, has no weight, and a temperature;
    - it is computed in log space; the code takes the log of a softmax and adds epsilons.

    And differences that nothing undoes: only the class token is classified, while the code also
    returns predictions of the single tokens; batches and masks, while the code drops all bags of a
    batch but one; it runs, while the code lacks a module that it imports; the anchor is in
    evaluation mode, which here is the same; and what the code's training script does (F1 as a
    micro average, a seed that is not applied, epochs compared in unsorted order).
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        hidden: int = 512,
        n_tokens: int = 8,
        n_heads: int = 8,
        drop_rate: float = 0.5,
        drop: str = "bernoulli",
        token_blocks: str = "shared",
        normalization: str = "softmax",
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features,
            n_classes=n_classes,
            hidden=hidden,
            n_tokens=n_tokens,
            n_heads=n_heads,
        )
        check_dropout(drop_rate, name="drop_rate")
        check_choice("drop", drop, ("bernoulli", "count"))
        check_choice("token_blocks", token_blocks, ("shared", "per_token"))
        if hidden % n_heads:
            raise ValueError(
                f"hidden must be a multiple of n_heads={n_heads}, but got {hidden}. "
                "Change one of the two."
            )
        self.in_features = in_features
        self.drop_rate = drop_rate
        self.drop = drop
        self.normalization = normalization
        self.projection = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
        n_blocks = 1 if token_blocks == "shared" else n_tokens
        self.attention = normalized_scorer(
            FeatScorer(hidden, n_heads, n_tokens=n_tokens, n_blocks=n_blocks),
            normalization,
            rows_first=False,
        )
        self.readout = FeatReadout(hidden, n_heads, n_blocks=n_blocks)
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.class_attention = nn.MultiheadAttention(hidden, n_heads, batch_first=True)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, n_classes)
        self.reset_parameters()

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
        mask = check_bags("ASMIL", self.in_features, features, mask)
        instances = self.projection(features)
        scores = self.attention(*scorer_inputs(self.normalization, instances, mask=mask))
        scores = mask_scores(rearrange(scores, "b n r -> b r n"), mask)
        tokens = self.readout(attention_pool(scores, instances))
        class_token = self.class_token.expand(len(tokens), -1, -1)
        sequence = torch.cat([class_token, tokens], dim=1)
        dropped = F.pad(self._draw_dropped(tokens), (1, 0)) if self.training else None
        attended, _ = self.class_attention(
            class_token, sequence, sequence, key_padding_mask=dropped, need_weights=False
        )
        return MILOutput(self.head(self.norm(class_token + attended)[:, 0]), scores)

    def _draw_dropped(self, tokens: Float[Tensor, "bag token width"]) -> Bool[Tensor, "bag token"]:
        """Which FEAT tokens of each bag the class token does not see in this step."""
        n_tokens = tokens.shape[1]
        draws = torch.rand(tokens.shape[:2], device=tokens.device)
        if self.drop == "count":
            n_dropped = min(round(self.drop_rate * n_tokens), n_tokens - 1)
            return draws.argsort(dim=1).argsort(dim=1) < n_dropped
        # Where all fall below the rate, the highest draw stays.
        return (draws < self.drop_rate) & (draws < draws.amax(dim=1, keepdim=True))


def _start_maps(*maps: nn.Parameter) -> None:
    """Starts square matrices as PyTorch starts an attention (Xavier), not a linear layer.

    At a third of that variance the scores are so equal that the attention stays uniform for long.
    """
    for of_tokens in maps:
        for matrix in of_tokens:
            nn.init.xavier_uniform_(matrix)
