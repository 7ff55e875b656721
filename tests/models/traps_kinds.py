"""Small models of our own whose attention is no single scorer: gated siblings, class tokens,
multi-head attention and critical instances.

Written anew from the descriptions, as those in `traps_scores.py`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from tests.models.case import Case
from tests.models.traps_scores import (
    AmlabAttention,
    Batch,
    MaskedLinear,
    amlab_loss,
    builder,
    features_of,
    gated_scores,
    linear,
    millab_loss,
    millab_masked_loss,
    millab_output,
    owkin_loss,
    relu,
    wrapped,
)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """What the layer computes, without calling it."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def query_key(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """q . k / sqrt(d) of every head and query, as (bag, head and query, instance)."""
    q, k = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (queries, keys))
    return (q @ k.mT / math.sqrt(q.shape[-1])).flatten(1, 2)


def tokens_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(features_of(model, batch)), batch["label"])


# Gated siblings -----------------------------------------------------------------------------------


class AmlabGatedAttention(AmlabAttention):
    """AMLab `GatedAttention`: the product of the gates exists in no module."""

    def make_scorer(self) -> None:
        self.attention_V = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(16, 8), nn.Sigmoid())
        self.attention_w = nn.Linear(8, 1)

    def score(self, h: Tensor) -> Tensor:
        return self.attention_w(self.attention_V(h) * self.attention_U(h))


def _amlab_gated_scores(model: AmlabGatedAttention, batch: Batch) -> list[Tensor]:
    h = relu(model.feature_extractor_part2[0], features_of(model, batch))
    return [gated_scores(h, model.attention_V[0], model.attention_U[0], model.attention_w)]


class AttmilAttentionGated(nn.Module):
    """attmil `AttentionGated` of ACMIL and MHIM-MIL: batched, ReLU as value, no bias."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.feature = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.attention_a = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU())
        self.attention_b = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Sigmoid())
        self.attention_c = nn.Linear(8, 1, bias=False)
        self.classifier = nn.Sequential(nn.Linear(16, 2))

    def forward(self, x):
        x = self.feature(x)
        scores = self.attention_c(self.attention_a(x).mul(self.attention_b(x)))
        attention = scores.transpose(-1, -2).softmax(dim=-1)
        return self.classifier((attention @ x).squeeze(1))


def _attmil_scores(model: AttmilAttentionGated, batch: Batch) -> list[Tensor]:
    h = relu(model.feature[0], features_of(model, batch))
    gate = torch.sigmoid(linear(model.attention_b[0], h))
    return [linear(model.attention_c, relu(model.attention_a[0], h) * gate).mT]


# Class tokens -------------------------------------------------------------------------------------


class NystromAttention(nn.Module):
    """Attention through landmarks: zeros in front move every token, no softmax over tiles runs."""

    def __init__(self, dim: int = 16, heads: int = 2, landmarks: int = 4) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x):
        n_tokens = x.shape[1]
        x = F.pad(x, (0, 0, -n_tokens % self.landmarks, 0))
        q, k, v = rearrange(self.to_qkv(x), "b n (c h d) -> c b h n d", c=3, h=self.heads)
        q = q / math.sqrt(q.shape[-1])
        q_mark, k_mark = (
            reduce(y, "b h (m g) d -> b h m d", "mean", m=self.landmarks) for y in (q, k)
        )
        kernel = torch.softmax(q_mark @ k_mark.mT, dim=-1)
        out = torch.softmax(q_mark @ k.mT, dim=-1) @ v
        out = torch.softmax(q @ k_mark.mT, dim=-1) @ (_iterated_inverse(kernel) @ out)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))[:, -n_tokens:]


def _iterated_inverse(a: Tensor, n_steps: int = 6) -> Tensor:
    """The pseudo-inverse of Nystromformer (Xiong et al. 2021, eq. 11)."""
    one = torch.eye(a.shape[-1], dtype=a.dtype)
    z = a.mT / (a.sum(-1).max() * a.sum(-2).max())
    for _ in range(n_steps):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


class TransLayer(nn.Module):
    """TransMIL `TransLayer`: normalises before it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = NystromAttention()

    def forward(self, x):
        return x + self.attn(self.norm(x))


class PPEG(nn.Module):
    """TransMIL `PPEG`: convolves the instances as a square."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x, side):
        tiles = rearrange(x[:, 1:], "b (h w) d -> b d h w", h=side)
        tiles = rearrange(tiles + self.proj(tiles), "b d h w -> b (h w) d")
        return torch.cat([x[:, :1], tiles], dim=1)


def squared(h: Tensor) -> tuple[Tensor, int]:
    """The instances, the first of them repeated to fill a square, and its side."""
    side = math.ceil(math.sqrt(h.shape[1]))
    return torch.cat([h, h[:, : side * side - h.shape[1]]], dim=1), side


class TransMIL(nn.Module):
    """Official `TransMIL`: keyword arguments only, a dict out, no attention returned."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self._fc1 = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.layer1, self.pos_layer, self.layer2 = TransLayer(), PPEG(), TransLayer()
        self.norm = nn.LayerNorm(16)
        self._fc2 = nn.Linear(16, 2)

    def tokens(self, h: Tensor) -> Tensor:
        """The input of the last layer."""
        h, side = squared(self._fc1(h))
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], dim=1)
        return self.pos_layer(self.layer1(h), side)

    def forward(self, **kwargs):
        h = self.layer2(self.tokens(kwargs["data"]))
        logits = self._fc2(self.norm(h)[:, 0])
        return {"logits": logits, "Y_prob": logits.softmax(1), "Y_hat": logits.argmax(1)}


def _transmil_loss(model: TransMIL, batch: Batch) -> Tensor:
    return F.cross_entropy(model(data=features_of(model, batch))["logits"], batch["label"])


def class_token_scores(tokens: Tensor, qkv: nn.Linear, heads: int, n_instances: int) -> Tensor:
    """The class token's row of a fused projection over the first instances."""
    q, k, _ = linear(qkv, tokens).chunk(3, dim=-1)
    return query_key(q[:, :1], k[:, 1 : 1 + n_instances], heads)


def _transmil_scores(model: TransMIL, batch: Batch) -> list[Tensor]:
    x = features_of(model, batch)
    layer = model.layer2
    tokens = layer_norm(layer.norm, model.tokens(x))
    return [class_token_scores(tokens, layer.attn.to_qkv, layer.attn.heads, x.shape[1])]


class MilLabTransBlock(nn.Module):
    """MIL-Lab's block: `attention` where the official layer says `attn`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = NystromAttention()

    def forward(self, x):
        return x + self.attention(self.norm(x))


class MilLabTransMIL(nn.Module):
    """MIL-Lab `TransMIL`: a list of blocks, the mask ignored."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(MilLabTransBlock() for _ in range(2))
        self.pos_layer = PPEG()
        self.norm, self.classifier = nn.LayerNorm(16), nn.Linear(16, 2)

    def tokens(self, h: Tensor) -> Tensor:
        """The input of the last block."""
        h, side = squared(self.patch_embed(h))
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], dim=1)
        return self.pos_layer(self.blocks[0](h), side)

    def forward(self, h, loss_fn=None, label=None, attn_mask=None):
        h = self.norm(self.blocks[-1](self.tokens(h)))
        return millab_output(self.classifier(h[:, 0]), loss_fn, label)


def _millab_transmil_scores(model: nn.Module, batch: Batch) -> list[Tensor]:
    x = features_of(model, batch)
    block = model.model.blocks[-1]
    tokens = layer_norm(block.norm, model.model.tokens(x))
    return [class_token_scores(tokens, block.attention.to_qkv, block.attention.heads, x.shape[1])]


class MhimSelfAttention(nn.Module):
    """MHIM-MIL `SAttention`: a TransMIL without the square."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.layer1, self.layer2 = TransLayer(), TransLayer()
        self.norm = nn.LayerNorm(16)

    def tokens(self, x: Tensor) -> Tensor:
        """The input of the last layer."""
        return self.layer1(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))

    def forward(self, x):
        return self.norm(self.layer2(self.tokens(x)))[:, 0]


class Mhim(nn.Module):
    """MHIM-MIL `MHIM`, selfattn: in train the attention sees only the instances that are kept."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_to_emb = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.online_encoder = MhimSelfAttention()
        self.predictor = nn.Linear(16, 2)

    def kept(self, x: Tensor) -> Tensor:
        """Two of three instances in train; the original draws them."""
        return x[:, torch.arange(x.shape[1]) % 3 != 1] if self.training else x

    def forward(self, x):
        h = self.kept(self.patch_to_emb(x))
        logits = self.predictor(self.online_encoder(h))
        return (logits, logits.new_zeros(()), x.shape[1], h.shape[1]) if self.training else logits


def _mhim_loss(model: Mhim, batch: Batch) -> Tensor:
    outputs = model(features_of(model, batch))
    return F.cross_entropy(outputs[0] if model.training else outputs, batch["label"])


def _mhim_scores(model: Mhim, batch: Batch) -> list[Tensor]:
    h = model.kept(relu(model.patch_to_emb[0], features_of(model, batch)))
    layer = model.online_encoder.layer2
    tokens = layer_norm(layer.norm, model.online_encoder.tokens(h))
    return [class_token_scores(tokens, layer.attn.to_qkv, layer.attn.heads, h.shape[1])]


class ViTAttention(nn.Module):
    """Self-attention of a vision transformer: fused, flash, its scores are never a tensor."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (c h d) -> c b h n d", c=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class ViTBlock(nn.Module):
    """A block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = ViTAttention()
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BagViT(nn.Module):
    """A vision transformer over instances: class token, neither square nor padding."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(width, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(ViTBlock() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The input of the last block."""
        x = self.patch_embed(x)
        return self.blocks[0](torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))

    def forward(self, x):
        return self.head(self.norm(self.blocks[-1](self.tokens(x)))[:, 0])


def _vit_scores(model: BagViT, batch: Batch) -> list[Tensor]:
    x = features_of(model, batch)
    block = model.blocks[-1]
    tokens = layer_norm(block.norm1, model.tokens(x))
    return [class_token_scores(tokens, block.attn.qkv, block.attn.num_heads, x.shape[1])]


class OwkinSelfAttention(nn.Module):
    """owkin's full attention: every token in one softmax, and no attribute tells its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (c h d) -> c b h n d", c=3, h=2)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.proj(rearrange(attention @ v, "b h n d -> b n (h d)"))


class OwkinLayer(nn.Module):
    """owkin's `TransLayer`: the model calls its forward, so no hook on it fires."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = OwkinSelfAttention()

    def forward(self, x):
        return x + self.attn(self.norm(x))


class OwkinTransMIL(nn.Module):
    """owkin `TransMIL`: square, positions and class token, but an ordinary softmax."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.tiles_emb = nn.Linear(width, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.cor, self.pos_enc, self.agg = OwkinLayer(), PPEG(), OwkinLayer()
        self.mlp = nn.Linear(16, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The input of the last layer."""
        h, side = squared(self.tiles_emb(x))
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], dim=1)
        return self.pos_enc.forward(self.cor.forward(h), side)

    def forward(self, x):
        return self.mlp(self.agg.forward(self.tokens(x))[:, 0])


def _owkin_transmil_scores(model: OwkinTransMIL, batch: Batch) -> list[Tensor]:
    x = features_of(model, batch)
    tokens = layer_norm(model.agg.norm, model.tokens(x))
    return [class_token_scores(tokens, model.agg.attn.qkv, 2, x.shape[1])]


# Multi-head attention -----------------------------------------------------------------------------


def multihead_scores(attention: nn.MultiheadAttention, queries: Tensor, keys: Tensor) -> Tensor:
    """Rows of an nn.MultiheadAttention, head by head, from its packed weights."""
    (w_q, w_k, _), (b_q, b_k, _) = (
        attention.in_proj_weight.chunk(3),
        attention.in_proj_bias.chunk(3),
    )
    return query_key(queries @ w_q.T + b_q, keys @ w_k.T + b_k, attention.num_heads)


def sharp_heads(
    make: Callable[[], nn.Module], path: str, *, factor: float = 2.0
) -> Callable[[], nn.Module]:
    """How to build the model with larger queries and keys in this nn.MultiheadAttention."""

    def build() -> nn.Module:
        model = make()
        attention = model.get_submodule(path)
        with torch.no_grad():
            attention.in_proj_weight.mul_(factor)
            attention.in_proj_bias.normal_()
        return model

    return build


class MilLabTransformerBlock(nn.Module):
    """MIL-Lab's Transformer block: the instances come first, (token, bag, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h)[0]


class MilLabTransformer(nn.Module):
    """MIL-Lab `Transformer`: one bag, class token first, weights of all heads averaged."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(MilLabTransformerBlock() for _ in range(2))
        self.norm, self.classifier = nn.LayerNorm(16), nn.Linear(16, 2)

    def tokens(self, h: Tensor) -> Tensor:
        """The input of the last block."""
        h = torch.cat([self.cls_token, self.patch_embed(h)], dim=1)
        return self.blocks[0](h.transpose(0, 1))

    def forward(self, h, loss_fn=None, label=None):
        h = self.norm(self.blocks[-1](self.tokens(h)))
        return millab_output(self.classifier(h[0]), loss_fn, label)


def _millab_transformer_scores(model: nn.Module, batch: Batch) -> list[Tensor]:
    block = model.model.blocks[-1]
    tokens = layer_norm(block.norm, model.model.tokens(features_of(model, batch))).transpose(0, 1)
    return [multihead_scores(block.attention, tokens[:, :1], tokens[:, 1:])]


class MilLabMultiHeadAttention(nn.Module):
    """MIL-Lab ILRA's attention: projects before an nn.MultiheadAttention projects again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_q, self.fc_k, self.fc_v = (nn.Linear(16, 16) for _ in range(3))
        self.multihead_attention = nn.MultiheadAttention(16, 2)
        self.fc_o = nn.Linear(16, 16)

    def forward(self, query, x):
        q, k, v = (y.transpose(0, 1) for y in (self.fc_q(query), self.fc_k(x), self.fc_v(x)))
        out, _ = self.multihead_attention(q, k, v)
        return F.relu(self.fc_o((q + out).transpose(0, 1)))


class AcmilMultiHeadAttention(nn.Module):
    """ACMIL ILRA's attention: bags first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_q, self.fc_k, self.fc_v = (nn.Linear(16, 16) for _ in range(3))
        self.multihead_attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc_o = nn.Linear(16, 16)

    def forward(self, query, x):
        q = self.fc_q(query)
        out, _ = self.multihead_attn(q, self.fc_k(x), self.fc_v(x), need_weights=False)
        return F.relu(self.fc_o(q + out))


class IlraPooling(nn.Module):
    """ILRA's pooling: learned seeds ask, instances answer; the seeds live outside the attention."""

    def __init__(self, mha: nn.Module, n_seeds: int) -> None:
        super().__init__()
        self.S = nn.Parameter(torch.randn(1, n_seeds, 16))
        self.mha = mha

    def forward(self, x):
        return self.mha(self.S.expand(len(x), -1, -1), x)


class IlraBlock(nn.Module):
    """ILRA's gated block: its latents attend to the instances too, before the pooling does."""

    def __init__(self, mha: type[nn.Module]) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 3, 16))
        self.project_forward, self.project_backward = mha(), mha()

    def forward(self, x):
        return self.project_backward(x, self.project_forward(self.latent.expand(len(x), -1, -1), x))


class AcmilILRA(nn.Module):
    """ACMIL `ILRA`: several seeds, so a row for every head and seed; flash attention."""

    mha: type[nn.Module] = AcmilMultiHeadAttention
    n_seeds = 2

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.reduce = nn.Linear(width, 16)
        self.gab_blocks = nn.ModuleList([IlraBlock(self.mha)])
        self.pooling = IlraPooling(self.mha(), self.n_seeds)
        self.classifier = nn.Linear(16, 2)

    def encode(self, x: Tensor) -> Tensor:
        """The instances that the pooling sees."""
        return self.gab_blocks[0](self.reduce(x))

    def forward(self, x):
        return self.classifier(self.pooling(self.encode(x)).mean(1))


class MilLabILRA(AcmilILRA):
    """MIL-Lab `ILRA`: one seed, its own names, instances first."""

    mha = MilLabMultiHeadAttention
    n_seeds = 1

    def forward(self, h, loss_fn=None, label=None):
        return millab_output(super().forward(h), loss_fn, label)


def _ilra_scores(model: AcmilILRA, batch: Batch, attention: str = "multihead_attn") -> list[Tensor]:
    h, mha = model.encode(features_of(model, batch)), model.pooling.mha
    queries = linear(mha.fc_q, model.pooling.S).expand(len(h), -1, -1)
    return [multihead_scores(mha.get_submodule(attention), queries, linear(mha.fc_k, h))]


def _millab_ilra_scores(model: nn.Module, batch: Batch) -> list[Tensor]:
    return _ilra_scores(model.model, batch, "multihead_attention")


class StampSelfAttention(nn.Module):
    """STAMP `SelfAttention`: normalises inside, pads through key_padding_mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mhsa = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, mask):
        x = self.norm(x)
        return self.mhsa(x, x, x, need_weights=False, key_padding_mask=mask)[0]


class StampTransformer(nn.Module):
    """STAMP `Transformer`: pairs of attention and feed-forward in lists without a forward."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [StampSelfAttention(), nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, x, mask, depth=None):
        for attention, feed_forward in self.layers[:depth]:
            x = x + attention(x, mask)
            x = x + feed_forward(x)
        return x if depth else self.norm(x)


class StampVisionTransformer(nn.Module):
    """STAMP `VisionTransformer`: mask True = pad, one longer than the bag by the class token."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(16))
        self.project_features = nn.Sequential(nn.Linear(width, 16), nn.GELU())
        self.transformer = StampTransformer()
        self.mlp_head = nn.Sequential(nn.Linear(16, 2))

    def tokens(self, bags: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The class token and the instances, and the mask of both."""
        h = self.project_features(bags)
        h = torch.cat([self.class_token.expand(len(h), 1, -1), h], dim=1)
        return h, F.pad(mask, (1, 0), value=False)

    def forward(self, bags, *, coords, mask):
        return self.mlp_head(self.transformer(*self.tokens(bags, mask))[:, 0])


def _stamp_loss(model: StampVisionTransformer, batch: Batch) -> Tensor:
    features = features_of(model, batch)
    logits = model(features, coords=torch.zeros_like(features[..., :2]), mask=~batch["mask"])
    return F.cross_entropy(logits, batch["label"])


def _stamp_scores(model: StampVisionTransformer, batch: Batch) -> list[Tensor]:
    tokens = model.tokens(features_of(model, batch), ~batch["mask"])
    last = model.transformer.layers[-1][0]
    h = layer_norm(last.norm, model.transformer(*tokens, depth=1))
    return [multihead_scores(last.mhsa, h[:, :1], h[:, 1:])]


# Critical instances -------------------------------------------------------------------------------


def critical_scores(queries: Tensor, classes: Tensor, scale: float | None = None) -> Tensor:
    """q . q_critical of each class, as (bag, class, instance)."""
    index = classes.argmax(dim=1)[..., None].expand(-1, -1, queries.shape[-1])
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    return scale * queries.gather(1, index) @ queries.mT


class FCLayer(nn.Module):
    """DSMIL `FCLayer`: passes the features on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, 2))

    def forward(self, feats):
        return feats, self.fc(feats)


class BClassifier(nn.Module):
    """DSMIL `BClassifier`: one query network called twice, softmax over dim 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
        self.v = nn.Identity()
        self.fcc = nn.Conv1d(2, 2, kernel_size=width)

    def forward(self, feats, c):
        values, queries = self.v(feats), self.q(feats)
        order = torch.sort(c, 0, descending=True).indices
        critical = self.q(feats[order[0]])
        scores = queries @ critical.transpose(0, 1)
        attention = F.softmax(scores / queries.shape[1] ** 0.5, 0)
        bag = attention.transpose(0, 1) @ values
        return self.fcc(bag[None]).view(1, -1), attention, bag


class MILNet(nn.Module):
    """Official DSMIL `MILNet`: one bag (instance, width), attention (instance, class)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.i_classifier, self.b_classifier = FCLayer(width), BClassifier(width)

    def forward(self, x):
        feats, classes = self.i_classifier(x)
        return classes, *self.b_classifier(feats, classes)


def _dsmil_loss(model: MILNet, batch: Batch) -> Tensor:
    classes, bag, _, _ = model(features_of(model, batch)[0])
    top = classes.max(0, keepdim=True).values
    label = batch["label"]
    return 0.5 * F.cross_entropy(bag, label) + 0.5 * F.cross_entropy(top, label)


def _dsmil_scores(model: MILNet, batch: Batch) -> list[Tensor]:
    x = features_of(model, batch)
    first, last = model.b_classifier.q[0], model.b_classifier.q[2]
    queries = torch.tanh(linear(last, relu(first, x)))
    return [critical_scores(queries, linear(model.i_classifier.fc[0], x))]


class MilLabBClassifier(nn.Module):
    """MIL-Lab `BClassifier`: masks before scaling, but chooses the critical instance unmasked."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(16, 8), nn.Linear(16, 16)
        self.fcc = nn.Conv1d(3, 3, kernel_size=16)  # never used, as in the original

    def forward(self, feats, c, attn_mask=None):
        queries = self.q(feats)
        order = torch.sort(c, dim=1, descending=True).indices[:, 0]
        critical = self.q(feats[torch.arange(len(feats))[:, None], order])
        scores = queries @ critical.transpose(1, 2)
        if attn_mask is not None:
            scores = scores + (1 - attn_mask.to(scores))[..., None] * torch.finfo(scores.dtype).min
        attention = F.softmax(scores / math.sqrt(queries.shape[-1]), dim=1)
        return attention.transpose(1, 2) @ self.v(feats), attention


class MilLabDSMIL(nn.Module):
    """MIL-Lab `DSMIL`: batched, with a parameter that no loss reaches."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.i_classifier = nn.Linear(16, 2)
        self.b_classifier = MilLabBClassifier()
        self.classifier = nn.Linear(32, 2)

    def forward(self, h, loss_fn=None, label=None, attn_mask=None):
        h = self.patch_embed(h)
        classes = self.i_classifier(h)
        bag, _ = self.b_classifier(h, classes, attn_mask=attn_mask)
        logits = 0.5 * (self.classifier(bag.flatten(1)) + classes.amax(1))
        return millab_output(logits, loss_fn, label)


def _millab_dsmil_scores(model: nn.Module, batch: Batch) -> list[Tensor]:
    h = relu(model.model.patch_embed[0], features_of(model, batch))
    queries = linear(model.model.b_classifier.q, h)
    return [critical_scores(queries, linear(model.model.i_classifier, h))]


class TorchmilDSMIL(nn.Module):
    """torchmil `DSMIL`: one call of the query network, whose critical row is gathered."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.feat_ext = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.inst_classifier = nn.Linear(16, 1)
        self.q_nn, self.v_nn = nn.Sequential(nn.Linear(16, 8)), nn.Linear(16, 16)
        self.bag_classifier = nn.Linear(16, 1)

    def forward(self, X, mask=None):  # noqa: N803
        h = self.feat_ext(X)
        instances = self.inst_classifier(h)
        order = torch.sort(instances, dim=1, descending=True).indices
        queries = self.q_nn(h)
        critical = queries.gather(1, order[:, :1].expand(-1, -1, queries.shape[-1]))
        scores = queries @ critical.transpose(1, 2) / math.sqrt(queries.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask[..., None] == 0, -torch.inf)
        bag = torch.softmax(scores, dim=1).transpose(1, 2) @ self.v_nn(h)
        return self.bag_classifier(bag).flatten(), instances.squeeze(-1)


def _torchmil_loss(model: TorchmilDSMIL, batch: Batch) -> Tensor:
    bag, instances = model(features_of(model, batch), mask=batch["mask"].float())
    label = batch["label"].to(bag.dtype)
    losses = (F.binary_cross_entropy_with_logits(x, label) for x in (bag, instances.amax(1)))
    return sum(losses)


def _torchmil_scores(model: TorchmilDSMIL, batch: Batch) -> list[Tensor]:
    h = relu(model.feat_ext[0], features_of(model, batch))
    return [critical_scores(linear(model.q_nn[0], h), linear(model.inst_classifier, h))]


class OwkinExtremeLayer(nn.Module):
    """owkin's extreme layer: the largest score and its index, out of the reach of padding."""

    def forward(self, scores):
        return scores.max(dim=1, keepdim=True)


class OwkinDSMIL(nn.Module):
    """owkin `DSMIL`: scores not divided by sqrt(d), no padding is ever critical."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.score_model = MaskedLinear(width, 1)
        self.extreme_layer = OwkinExtremeLayer()
        self.tiles_queries, self.tiles_values = nn.Linear(width, 8), nn.Linear(width, 16)
        self.mlp = nn.Linear(16, 2)

    def forward(self, features, mask):
        top, index = self.extreme_layer(self.score_model(features, mask=mask))
        queries = self.tiles_queries(features)
        critical = queries.gather(1, index.expand(-1, -1, queries.shape[-1]))
        scores = (queries @ critical.transpose(1, 2)).masked_fill(mask, -torch.inf)
        bag = (torch.softmax(scores, dim=1) * self.tiles_values(features)).sum(1)
        return self.mlp(bag) + top[..., 0]


def _owkin_dsmil_scores(model: OwkinDSMIL, batch: Batch) -> list[Tensor]:
    x = features_of(model, batch)
    classes = linear(model.score_model, x).masked_fill(~batch["mask"][..., None], -torch.inf)
    return [critical_scores(linear(model.tiles_queries, x), classes, scale=1.0)]


# Cases --------------------------------------------------------------------------------------------

KINDS = [
    Case(
        name="amlab_gated_attention",
        build=builder(AmlabGatedAttention, "attention_w"),
        loss=amlab_loss,
        scores=_amlab_gated_scores,
        site='GatedSite("attention_V", "attention_U", "attention_w", layout="n r")',
        found="attention_V+attention_U+attention_w",
    ),
    Case(
        name="attmil_attention_gated",
        build=builder(AttmilAttentionGated, "attention_c", factor=24.0),
        loss=tokens_loss,
        scores=_attmil_scores,
        site='GatedSite("attention_a", "attention_b", "attention_c")',
        found="attention_a+attention_b+attention_c",
        n_bags=2,
    ),
    Case(
        name="transmil",
        build=builder(TransMIL, "layer2.attn.to_qkv", factor=2.0),
        loss=_transmil_loss,
        scores=_transmil_scores,
        site='ClassTokenSite("layer2.attn.to_qkv")',
        found=None,
        proven=False,
        n_bags=2,
    ),
    Case(
        name="millab_transmil",
        build=builder(wrapped(MilLabTransMIL), "model.blocks.1.attention.to_qkv", factor=2.0),
        loss=millab_loss,
        scores=_millab_transmil_scores,
        site='ClassTokenSite("model.blocks.-1.attention.to_qkv")',
        found=None,
        proven=False,
        n_bags=2,
        n_instances=8,
    ),
    Case(
        name="mhim_selfattn",
        build=builder(Mhim, "online_encoder.layer2.attn.to_qkv", factor=2.0),
        loss=_mhim_loss,
        scores=_mhim_scores,
        site='ClassTokenSite("online_encoder.layer2.attn.to_qkv", squared=False)',
        found=None,
        proven=False,
        n_bags=2,
    ),
    Case(
        name="vision_transformer",
        build=builder(BagViT, "blocks.1.attn.qkv", factor=2.0),
        loss=tokens_loss,
        scores=_vit_scores,
        site='ClassTokenSite("blocks.-1.attn.qkv", squared=False)',
        found=None,
        n_bags=2,
    ),
    Case(
        name="owkin_transmil",
        build=builder(OwkinTransMIL, "agg.attn.qkv", factor=2.0),
        loss=tokens_loss,
        scores=_owkin_transmil_scores,
        site='ClassTokenSite("agg.attn.qkv", heads=2)',
        found=None,
        proven=False,  # its softmax is over the repeats too
        n_bags=2,
    ),
    Case(
        name="millab_transformer",
        build=sharp_heads(wrapped(MilLabTransformer), "model.blocks.1.attention"),
        loss=millab_loss,
        scores=_millab_transformer_scores,
        site='MultiheadSite("model.blocks.-1.attention", class_token=True)',
        found=None,
    ),
    Case(
        name="millab_ilra",
        build=sharp_heads(wrapped(MilLabILRA), "model.pooling.mha.multihead_attention", factor=6.0),
        loss=millab_loss,
        scores=_millab_ilra_scores,
        site='MultiheadSite("model.pooling.mha", tap="multihead_attention")',
        found=None,
        n_bags=2,
    ),
    Case(
        name="acmil_ilra",
        build=sharp_heads(AcmilILRA, "pooling.mha.multihead_attn", factor=6.0),
        loss=tokens_loss,
        scores=_ilra_scores,
        site='MultiheadSite("pooling.mha", tap="multihead_attn")',
        found=None,
        n_bags=2,
    ),
    Case(
        name="stamp_vision_transformer",
        build=sharp_heads(StampVisionTransformer, "transformer.layers.1.0.mhsa"),
        loss=_stamp_loss,
        scores=_stamp_scores,
        site='MultiheadSite("transformer.layers.-1.0.mhsa", class_token=True)',
        found=None,
        n_bags=3,
        padded=True,
    ),
    Case(
        name="dsmil",
        build=builder(MILNet, "b_classifier.q.0", "b_classifier.q.2", factor=2.0),
        loss=_dsmil_loss,
        scores=_dsmil_scores,
        site='CriticalInstanceSite("b_classifier.q")',
        found=None,
    ),
    Case(
        name="millab_dsmil",
        build=builder(wrapped(MilLabDSMIL), "model.b_classifier.q", factor=3.0),
        loss=millab_masked_loss,
        scores=_millab_dsmil_scores,
        site='CriticalInstanceSite("model.b_classifier.q")',
        found=None,
        n_bags=3,
        padded=True,
    ),
    Case(
        name="gathering_dsmil",
        build=builder(TorchmilDSMIL, "q_nn.0", factor=3.0),
        loss=_torchmil_loss,
        scores=_torchmil_scores,
        site='CriticalInstanceSite("q_nn", classifier="inst_classifier")',
        found=None,
        n_bags=3,
        padded=True,
    ),
    Case(
        name="owkin_dsmil",
        build=builder(OwkinDSMIL, "tiles_queries", factor=1.5),
        loss=owkin_loss,
        scores=_owkin_dsmil_scores,
        site='CriticalInstanceSite("tiles_queries", classifier="score_model", scale=1.0)',
        found=None,
        n_bags=3,
        padded=True,
    ),
]
