"""Small models of our own with the scorers, and the traps, of MIL code that cannot be installed.

Each follows the description of a published model: its submodule paths, forward signature, return
form and trap. All are written anew; names carry the repository in front, because many of these
repositories call their models alike.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.case import Case

Batch = dict[str, Any]


def features_of(model: nn.Module, batch: Batch) -> Tensor:
    """The features in the precision of the model."""
    return batch["features"].to(next(model.parameters()).dtype)


def sharp(model: nn.Module, *paths: str, factor: float = 12.0) -> nn.Module:
    """The model with larger weights at these paths: nearly equal scores would hide mistakes."""
    with torch.no_grad():
        for path in paths:
            model.get_submodule(path).weight.mul_(factor)
    return model


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """What the layer computes, without calling it: no hook fires."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def tanh_scores(h: Tensor, hidden: nn.Linear, last: nn.Linear) -> Tensor:
    """w tanh(V h) of each instance, as (bag, row, instance)."""
    return linear(last, torch.tanh(linear(hidden, h))).mT


def gated_scores(h: Tensor, value: nn.Linear, gate: nn.Linear, last: nn.Linear) -> Tensor:
    """w (tanh(V h) * sigmoid(U h)) of each instance, as (bag, row, instance)."""
    return linear(last, torch.tanh(linear(value, h)) * torch.sigmoid(linear(gate, h))).mT


def relu(layer: nn.Linear, x: Tensor) -> Tensor:
    """The encoder of most models here, without calling it."""
    return torch.relu(linear(layer, x))


# AMLab ----------------------------------------------------------------------------------------


class AmlabAttention(nn.Module):
    """AMLab `Attention`: drops the bag axis, one probability instead of two logits."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.feature_extractor_part2 = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.make_scorer()
        self.classifier = nn.Sequential(nn.Linear(16, 1), nn.Sigmoid())

    def make_scorer(self) -> None:
        self.attention = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))

    def score(self, h: Tensor) -> Tensor:
        return self.attention(h)

    def forward(self, x):
        h = self.feature_extractor_part2(x.squeeze(0))
        attention = F.softmax(torch.transpose(self.score(h), 1, 0), dim=1)
        y_prob = self.classifier(attention @ h)
        return y_prob, (y_prob >= 0.5).float(), attention


def amlab_loss(model: nn.Module, batch: Batch) -> Tensor:
    y_prob = model(features_of(model, batch))[0].clamp(1e-5, 1 - 1e-5)
    return F.binary_cross_entropy(y_prob[:, 0], batch["label"].to(y_prob.dtype))


def _amlab_scores(model: AmlabAttention, batch: Batch) -> list[Tensor]:
    h = relu(model.feature_extractor_part2[0], features_of(model, batch))
    return [tanh_scores(h, model.attention[0], model.attention[2])]


# CLAM, and its copies in MHIM-MIL and ACMIL ------------------------------------------------------


class AttnNet(nn.Module):
    """CLAM `Attn_Net`: a tuple, scores first."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, rows))

    def forward(self, x):
        return self.module(x), x


class AttnNetGated(nn.Module):
    """CLAM `Attn_Net_Gated`: a tuple, scores first."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(16, 8), nn.Sigmoid())
        self.attention_c = nn.Linear(8, rows)

    def forward(self, x):
        return self.attention_c(self.attention_a(x) * self.attention_b(x)), x


def instance_loss(attention: Tensor, h: Tensor, classifier: nn.Module, n_sample: int = 3) -> Tensor:
    """The instances of most attention are positives, those of least attention negatives."""
    picked = torch.cat([attention.topk(n_sample).indices, (-attention).topk(n_sample).indices])
    target = torch.arange(2 * n_sample) < n_sample
    return F.cross_entropy(classifier(h[picked]), target.long())


class ClamSB(nn.Module):
    """CLAM `CLAM_SB`: one bag (instance, width), scorer inside a Sequential, instance loss."""

    n_rows = 1

    def __init__(self, width: int = 12, *, gate: bool = True, dropout: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(width, 16), nn.ReLU()]
        layers += [nn.Dropout(0.0)] * dropout
        layers += [AttnNetGated(self.n_rows) if gate else AttnNet(self.n_rows)]
        self.attention_net = nn.Sequential(*layers)
        self.classifiers = self.make_classifiers()
        self.instance_classifiers = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))

    def make_classifiers(self) -> nn.Module:
        return nn.Linear(16, 2)

    def classify(self, pooled: Tensor) -> Tensor:
        return self.classifiers(pooled)

    def normalise(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=1)

    def forward(self, h, label=None, instance_eval=False):
        scores, h = self.attention_net(h)
        scores = torch.transpose(scores, 1, 0)
        attention = self.normalise(scores)
        results = {}
        if instance_eval:
            row = attention[label % self.n_rows]
            results["instance_loss"] = instance_loss(row, h, self.instance_classifiers[label])
        logits = self.classify(attention @ h)
        return logits, F.softmax(logits, dim=1), logits.argmax(1), scores, results


class ClamMB(ClamSB):
    """CLAM `CLAM_MB`: a row of attention, and a classifier, per class."""

    n_rows = 2

    def make_classifiers(self) -> nn.Module:
        return nn.ModuleList(nn.Linear(16, 1) for _ in range(2))

    def classify(self, pooled: Tensor) -> Tensor:
        return torch.cat([f(row) for f, row in zip(self.classifiers, pooled, strict=True)])[None]


class AcmilClamMB(ClamMB):
    """ACMIL `CLAM_MB`: softmax_one, exp / (1 + sum of exp), whose rows do not sum to one."""

    def normalise(self, scores: Tensor) -> Tensor:
        mass = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        return mass / (1 + mass.sum(dim=1, keepdim=True))


def _clam_loss(model: ClamSB, batch: Batch) -> Tensor:
    features = features_of(model, batch)[0]
    logits, *_, results = model(features, label=int(batch["label"]), instance_eval=True)
    return 0.7 * F.cross_entropy(logits, batch["label"]) + 0.3 * results["instance_loss"]


def _clam_scores(model: nn.Module, batch: Batch) -> list[Tensor]:
    h = relu(model.attention_net[0], features_of(model, batch))
    scorer = model.attention_net[-1]
    if isinstance(scorer, AttnNet):
        return [tanh_scores(h, scorer.module[0], scorer.module[2])]
    return [gated_scores(h, scorer.attention_a[0], scorer.attention_b[0], scorer.attention_c)]


class MhimClamSB(nn.Module):
    """MHIM-MIL `CLAM_SB`: batched, and the scorer moves to index 2 where dropout is off."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.attention_net = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), AttnNetGated(1))
        self.classifiers = nn.Linear(16, 2)
        self.instance_classifiers = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))

    def forward(self, x, label=None):
        scores, h = self.attention_net(x)
        attention = F.softmax(scores.transpose(-1, -2), dim=-1)
        logits = self.classifiers((attention @ h).squeeze(1))
        if label is None:
            return logits
        losses = [
            instance_loss(row[0], bag, self.instance_classifiers[k])
            for row, bag, k in zip(attention, h, label.tolist(), strict=True)
        ]
        return logits, torch.stack(losses).mean(), h.shape[1]


def _mhim_clam_loss(model: MhimClamSB, batch: Batch) -> Tensor:
    logits, instances, _ = model(features_of(model, batch), label=batch["label"])
    return F.cross_entropy(logits, batch["label"]) + instances


class MhimDAttention(nn.Module):
    """MHIM-MIL `DAttention`: batched, no bias, and the attention it returns is post-softmax."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.feature = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.attention = nn.Sequential(
            nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False)
        )
        self.classifier = nn.Sequential(nn.Linear(16, 2))

    def forward(self, x, return_attn=False):
        x = self.feature(x)
        attention = F.softmax(torch.transpose(self.attention(x), -1, -2), dim=-1)
        logits = self.classifier((attention @ x).squeeze(1))
        return (logits, attention.squeeze(1)) if return_attn else logits


def _mhim_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(features_of(model, batch)), batch["label"])


def _mhim_scores(model: MhimDAttention, batch: Batch) -> list[Tensor]:
    h = relu(model.feature[0], features_of(model, batch))
    return [tanh_scores(h, model.attention[0], model.attention[2])]


# ACMIL, AEM and ASMIL ----------------------------------------------------------------------------


class AttentionGatedRows(nn.Module):
    """ACMIL `Attention_Gated`: (instance, width) -> (row, instance), raw."""

    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(16, 8), nn.Sigmoid())
        self.attention_weights = nn.Linear(8, rows)

    def forward(self, x):
        scores = self.attention_weights(self.attention_V(x) * self.attention_U(x))
        return torch.transpose(scores, 1, 0)


class DimReduction(nn.Module):
    """ACMIL `DimReduction`: the encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 16, bias=False)

    def forward(self, x):
        return F.relu(self.fc1(x))


def _rows_scores(block: AttentionGatedRows, h: Tensor) -> Tensor:
    return gated_scores(h, block.attention_V[0], block.attention_U[0], block.attention_weights)


def _acmil_scores(model: nn.Module, batch: Batch) -> list[Tensor]:
    return [_rows_scores(model.attention, relu(model.dimreduction.fc1, features_of(model, batch)))]


class AcmilABMIL(nn.Module):
    """ACMIL `ABMIL`: x[0] drops every bag but the first; scores (row, instance)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.dimreduction = DimReduction(width)
        self.attention = AttentionGatedRows()
        self.classifier = nn.Linear(16, 2)

    def forward(self, x):
        x = self.dimreduction(x[0])
        attention = F.softmax(self.attention(x), dim=1)
        return self.classifier(attention @ x)


def _acmil_abmil_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(features_of(model, batch)), batch["label"])


class AcmilGA(nn.Module):
    """ACMIL `ACMIL_GA`: in train some of the largest scores become -1e9 after the scorer."""

    n_masked, n_rows = 4, 3

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.dimreduction = DimReduction(width)
        self.attention = AttentionGatedRows(self.n_rows)
        self.classifier = nn.ModuleList(nn.Linear(16, 2) for _ in range(self.n_rows))
        self.Slide_classifier = nn.Linear(16, 2)

    def forward(self, x):
        x = self.dimreduction(x[0])
        scores = self.attention(x)
        if self.training and self.n_masked:
            top = scores.topk(self.n_masked, dim=-1).indices
            drawn = torch.rand(top.shape).argsort(-1)[:, : self.n_masked // 2]
            scores = scores.scatter(-1, top.gather(-1, drawn), -1e9)
        attention = F.softmax(scores, dim=1)
        tokens = attention @ x
        parts = [f(token) for f, token in zip(self.classifier, tokens, strict=True)]
        bag = attention.mean(0, keepdim=True) @ x
        return torch.stack(parts), self.Slide_classifier(bag), scores[None]


class AemACMIL(AcmilGA):
    """AEM `ACMIL`: one row, no masking; its loss runs a softmax of its own on returned scores."""

    n_masked, n_rows = 0, 1


class AsmilMYGA(AcmilGA):
    """ASMIL `ACMIL_MYGA`: normalises sigmoids (sigmax), so no softmax is found."""

    def forward(self, x):
        x = self.dimreduction(x[0])
        scores = self.attention(x)
        mass = torch.sigmoid(scores)
        attention = mass / mass.sum(dim=1, keepdim=True)
        parts = [f(token) for f, token in zip(self.classifier, attention @ x, strict=True)]
        bag = attention.mean(0, keepdim=True) @ x
        return torch.stack(parts), self.Slide_classifier(bag), scores[None]


def _acmil_loss(model: nn.Module, batch: Batch) -> Tensor:
    parts, slide, _ = model(features_of(model, batch))
    label = batch["label"]
    return F.cross_entropy(slide, label) + F.cross_entropy(parts, label.expand(len(parts)))


def _aem_loss(model: AemACMIL, batch: Batch) -> Tensor:
    """Cross-entropy less the entropy of the attention."""
    parts, slide, scores = model(features_of(model, batch))
    log_attention = F.log_softmax(scores, dim=-1)
    entropy = -(log_attention.exp() * log_attention).sum(-1).mean()
    classes = F.cross_entropy(slide, batch["label"]) + F.cross_entropy(parts, batch["label"])
    return classes - 0.1 * entropy


class MutiHeadAttention(nn.Module):
    """ACMIL `MutiHeadAttention`: its first input is the query, its scores come second."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.out_proj = nn.Linear(16, 16)

    def forward(self, q, k, v):
        q, k, v = (
            f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for f, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        pooled = torch.softmax(scores, dim=-1) @ v
        return self.out_proj(pooled.transpose(1, 2).flatten(-2))[0], scores[0]


def _head_scores(block: MutiHeadAttention, query: Tensor, h: Tensor) -> Tensor:
    heads = (block.num_heads, -1)
    q = linear(block.q_proj, query).unflatten(-1, heads).transpose(1, 2)
    k = linear(block.k_proj, h).unflatten(-1, heads).transpose(1, 2)
    return (q @ k.mT / q.shape[-1] ** 0.5)[:, :, 0]


class AcmilMHA(nn.Module):
    """ACMIL `MHA`: the learned query lives in the model, outside the scorer."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.dimreduction = DimReduction(width)
        self.attention = MutiHeadAttention()
        self.q = nn.Parameter(torch.randn(1, 1, 16))
        self.classifier = nn.Linear(16, 2)

    def forward(self, x):
        x = self.dimreduction(x)
        pooled, _ = self.attention(self.q, x, x)
        return self.classifier(pooled)


def _acmil_mha_scores(model: AcmilMHA, batch: Batch) -> list[Tensor]:
    h = relu(model.dimreduction.fc1, features_of(model, batch))
    return [_head_scores(model.attention, model.q, h)]


class AcmilACMILMHA(nn.Module):
    """ACMIL `ACMIL_MHA`: a list of scorers, whose scores are softmaxed again for the bag."""

    def __init__(self, width: int = 12, n_token: int = 3) -> None:
        super().__init__()
        self.dimreduction = DimReduction(width)
        self.sub_attention = nn.ModuleList(MutiHeadAttention() for _ in range(n_token))
        self.q = nn.Parameter(torch.randn(1, n_token, 16))
        self.classifier = nn.ModuleList(nn.Linear(16, 2) for _ in range(n_token))
        self.Slide_classifier = nn.Linear(16, 2)

    def forward(self, x):
        x = self.dimreduction(x)
        queries = self.q.unbind(1)
        pooled, scores = zip(
            *(f(q[:, None], x, x) for f, q in zip(self.sub_attention, queries, strict=True)),
            strict=True,
        )
        parts = [f(token) for f, token in zip(self.classifier, pooled, strict=True)]
        scores = torch.cat(scores, dim=1)
        bag = torch.softmax(scores, dim=-1).mean((0, 1)) @ x[0]
        return torch.cat(parts), self.Slide_classifier(bag)[None], scores


def _acmil_acmil_mha_scores(model: AcmilACMILMHA, batch: Batch) -> list[Tensor]:
    h = relu(model.dimreduction.fc1, features_of(model, batch))
    pairs = zip(model.sub_attention, model.q.unbind(1), strict=True)
    return [torch.cat([_head_scores(block, q[:, None], h) for block, q in pairs], dim=1)]


class AcmilIBMIL(nn.Module):
    """ACMIL `IBMIL`: a second softmax, over confounders instead of instances."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.dimreduction = DimReduction(width)
        self.attention = AttentionGatedRows()
        self.register_buffer("confounder_feat", torch.randn(5, 16))
        self.W_q, self.W_k = nn.Linear(16, 8), nn.Linear(16, 8)
        self.classifier = nn.Linear(32, 2)

    def forward(self, x):
        x = self.dimreduction(x[0])
        attention = F.softmax(self.attention(x), dim=1)
        pooled = attention @ x
        likeness = self.W_k(self.confounder_feat) @ self.W_q(pooled).T / 8**0.5
        context = F.softmax(likeness, dim=0).T @ self.confounder_feat
        return self.classifier(torch.cat([pooled, context], dim=1)), pooled, attention


def _ibmil_loss(model: AcmilIBMIL, batch: Batch) -> Tensor:
    return F.cross_entropy(model(features_of(model, batch))[0], batch["label"])


class DtfdAttention(AttentionGatedRows):
    """DTFD `Attention_Gated`: returns probabilities unless told not to."""

    def forward(self, x, isNorm=True):  # noqa: N803
        scores = super().forward(x)
        return F.softmax(scores, dim=1) if isNorm else scores


class DtfdClassifier(nn.Module):
    """DTFD `Attention_with_Classifier`: the second tier, over pseudo-bags."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DtfdAttention()
        self.classifier = nn.Linear(16, 2)

    def forward(self, x):
        return self.classifier(self.attention(x) @ x)


class Dtfd(nn.Module):
    """DTFD of the ACMIL repository: one softmax per pseudo-bag, raw scores only in eval."""

    n_groups = 3

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.dimReduction = DimReduction(width)
        self.attention = DtfdAttention()
        self.classifier = nn.Linear(16, 2)
        self.attCls = DtfdClassifier()

    def forward(self, x):
        pseudo = []
        for group in range(self.n_groups):
            h = self.dimReduction(x[group :: self.n_groups])
            if self.training:
                attention = self.attention(h)
            else:
                attention = F.softmax(self.attention(h, isNorm=False), dim=1)
            pseudo.append(attention @ h)
        pooled = torch.cat(pseudo)
        return self.attCls(pooled), self.classifier(pooled)


def _dtfd_loss(model: Dtfd, batch: Batch) -> Tensor:
    slide, parts = model(features_of(model, batch)[0])
    label = batch["label"]
    return F.cross_entropy(slide, label) + F.cross_entropy(parts, label.expand(len(parts)))


def _dtfd_scores(model: Dtfd, batch: Batch) -> list[Tensor]:
    h = relu(model.dimReduction.fc1, features_of(model, batch))
    groups = (h[:, group :: model.n_groups] for group in range(model.n_groups))
    return [_rows_scores(model.attention, group) for group in groups]


# MIL-Lab -----------------------------------------------------------------------------------------


class MilLabModel(nn.Module):
    """MIL-Lab's Hugging Face wrapper: no hook on `model` ever fires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward = self.model.forward


def millab_output(logits: Tensor, loss_fn: Any, label: Any, extra: Any = 0) -> tuple[dict, dict]:
    """The results and the log that every model of MIL-Lab returns."""
    loss = None if loss_fn is None else loss_fn(logits, label) + extra
    return {"logits": logits, "loss": loss}, {"loss": -1 if loss is None else float(loss.detach())}


def millab_loss(model: MilLabModel, batch: Batch) -> Tensor:
    features = features_of(model, batch)
    return model(features, label=batch["label"], loss_fn=F.cross_entropy)[0]["loss"]


def millab_masked_loss(model: MilLabModel, batch: Batch) -> Tensor:
    results, _ = model(
        features_of(model, batch),
        loss_fn=F.cross_entropy,
        label=batch["label"],
        attn_mask=batch["mask"].float(),
    )
    return results["loss"]


class GlobalGatedAttention(nn.Module):
    """MIL-Lab `GlobalGatedAttention`: raw scores."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.0))
        self.attention_b = nn.Sequential(nn.Linear(16, 8), nn.Sigmoid(), nn.Dropout(0.0))
        self.attention_c = nn.Linear(8, 1)

    def forward(self, x):
        return self.attention_c(self.attention_a(x) * self.attention_b(x))


def _global_scores(block: GlobalGatedAttention, h: Tensor) -> Tensor:
    return gated_scores(h, block.attention_a[0], block.attention_b[0], block.attention_c)


class MilLabABMIL(nn.Module):
    """MIL-Lab `ABMIL`: the mask is added to the scores as the smallest number."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.global_attn = GlobalGatedAttention()
        self.classifier = nn.Linear(16, 2)

    def forward(self, h, loss_fn=None, label=None, attn_mask=None, return_attention=False):
        h = self.patch_embed(h)
        scores = self.global_attn(h).transpose(-2, -1)
        if attn_mask is not None:
            scores = (
                scores + (1 - attn_mask.to(scores)).unsqueeze(1) * torch.finfo(scores.dtype).min
            )
        pooled = F.softmax(scores, dim=-1) @ h
        results, log = millab_output(self.classifier(pooled.squeeze(1)), loss_fn, label)
        return results, log | ({"attention": scores} if return_attention else {})


class MilLabCLAMSB(MilLabABMIL):
    """MIL-Lab `CLAMSB`: one bag, label and loss required, the mask ignored."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        self.instance_classifiers = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))

    def forward(self, h, label, loss_fn, attn_mask=None):
        h = self.patch_embed(h).squeeze(0)
        attention = F.softmax(self.global_attn(h).transpose(-2, -1), dim=-1)
        instances = instance_loss(attention[0], h, self.instance_classifiers[int(label)])
        return millab_output(self.classifier(attention @ h), loss_fn, label, 0.3 * instances)


def _millab_abmil_scores(model: MilLabModel, batch: Batch) -> list[Tensor]:
    h = relu(model.model.patch_embed[0], features_of(model, batch))
    return [_global_scores(model.model.global_attn, h)]


class MilLabDFTD(nn.Module):
    """MIL-Lab `DFTD`: raw scores weight the features, no softmax anywhere; one call per group."""

    n_groups = 3

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.attention = GlobalGatedAttention()
        self.classifier = nn.Linear(16, 2)

    def forward(self, h, label, loss_fn):
        h = self.patch_embed(h).squeeze(0)
        groups = [h[group :: self.n_groups] for group in range(self.n_groups)]
        pooled = torch.cat([self.attention(group).transpose(-2, -1) @ group for group in groups])
        return millab_output(self.classifier(pooled.mean(0, keepdim=True)), loss_fn, label)


def _dftd_scores(model: MilLabModel, batch: Batch) -> list[Tensor]:
    h = relu(model.model.patch_embed[0], features_of(model, batch))
    groups = (h[:, group :: model.model.n_groups] for group in range(model.model.n_groups))
    return [_global_scores(model.model.attention, group) for group in groups]


class RrtAttention(nn.Module):
    """MIL-Lab RRT's scorer: pools inside, returns the pooled bag and post-softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Linear(16, 8, bias=False), nn.GELU(), nn.Linear(8, 1, bias=False)
        )

    def forward(self, x, no_norm=False):
        scores = self.attention(x).transpose(-1, -2)
        attention = F.softmax(scores, dim=-1)
        return (attention @ x).squeeze(1), scores if no_norm else attention


class RrtDAttention(nn.Module):
    """MIL-Lab RRT's `DAttention`: one level above the scorer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = RrtAttention()

    def forward(self, x, return_attn=False):
        pooled, attention = self.attention(x)
        return (pooled, attention.squeeze(1)) if return_attn else pooled


class RrtEncoder(nn.Module):
    """MIL-Lab RRT's encoder: features in, one pooled vector out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.pool_fn = RrtDAttention()

    def forward(self, x):
        return self.pool_fn(self.norm(x))


class MilLabRRTMIL(nn.Module):
    """MIL-Lab `RRTMIL`: the scores never leave the pooling."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_to_emb = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.encoder = RrtEncoder()
        self.predictor = nn.Linear(16, 2)

    def forward(self, h, loss_fn=None, label=None):
        return millab_output(self.predictor(self.encoder(self.patch_to_emb(h))), loss_fn, label)


def _rrt_scores(model: MilLabModel, batch: Batch) -> list[Tensor]:
    norm = model.model.encoder.norm
    h = relu(model.model.patch_to_emb[0], features_of(model, batch))
    h = F.layer_norm(h, (16,), norm.weight, norm.bias, norm.eps)
    hidden, _, last = model.model.encoder.pool_fn.attention.attention
    return [linear(last, F.gelu(linear(hidden, h))).mT]


class GlobalAttention(nn.Module):
    """PyTorch Geometric's `GlobalAttention`: exp and scattered sums, no softmax call."""

    def __init__(self, gate_nn: nn.Module) -> None:
        super().__init__()
        self.gate_nn = gate_nn

    def forward(self, x):
        index = torch.zeros(len(x), dtype=torch.long)
        gate = self.gate_nn(x)
        top = gate.new_full((1, 1), -torch.inf)
        top = top.scatter_reduce(0, index[:, None], gate.detach(), "amax")
        mass = (gate - top[index]).exp()
        total = mass.new_zeros(1, 1).index_add(0, index, mass) + 1e-16
        return x.new_zeros(1, x.shape[1]).index_add(0, index, mass / total[index] * x)


class MilLabWIKGMIL(nn.Module):
    """MIL-Lab `WIKGMIL`: a softmax over each instance's neighbours comes before the pooling."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self._fc1 = nn.Sequential(nn.Linear(width, 16), nn.LeakyReLU())
        self.W_head, self.W_tail = nn.Linear(16, 16), nn.Linear(16, 16)
        gate = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, 1))
        self.readout = GlobalAttention(gate)
        self.fc = nn.Linear(16, 2)

    def encode(self, x: Tensor) -> Tensor:
        x = self._fc1(x)
        head, tail = self.W_head(x), self.W_tail(x)
        near, index = torch.topk(head @ tail.transpose(-2, -1) / 4, k=4, dim=-1)
        neighbours = tail[torch.arange(len(x))[:, None, None], index]
        return F.leaky_relu(head + (F.softmax(near, dim=-1)[..., None] * neighbours).sum(2))

    def forward(self, h, loss_fn=None, label=None):
        pooled = self.readout(self.encode(h).squeeze(0))
        return millab_output(self.fc(pooled), loss_fn, label)


def _wikg_scores(model: MilLabModel, batch: Batch) -> list[Tensor]:
    hidden, _, last = model.model.readout.gate_nn
    h = model.model.encode(features_of(model, batch))
    return [linear(last, F.leaky_relu(linear(hidden, h))).mT]


# slideflow, owkin, TRIDENT ------------------------------------------------------------------------


def _masked_softmax(scores: Tensor, lens: Tensor) -> Tensor:
    real = torch.arange(scores.shape[1]) < lens[:, None]
    return torch.softmax(torch.where(real[..., None], scores, scores.new_tensor(-1e10)), dim=1)


class SlideflowAttentionMIL(nn.Module):
    """slideflow `Attention_MIL`: lengths instead of a mask, scores divided by a temperature."""

    def __init__(self, width: int = 12, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoder = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.attention = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(16, 2))

    def forward(self, bags, lens):
        h = self.encoder(bags)
        attention = _masked_softmax(self.attention(h) / self.temperature, lens)
        return self.head((attention * h).sum(1))


def _slideflow_loss(model: SlideflowAttentionMIL, batch: Batch) -> Tensor:
    logits = model(features_of(model, batch), batch["mask"].sum(1))
    return F.cross_entropy(logits, batch["label"])


def _slideflow_scores(model: SlideflowAttentionMIL, batch: Batch) -> list[Tensor]:
    h = relu(model.encoder[0], features_of(model, batch))
    return [tanh_scores(h, model.attention[0], model.attention[2]) / model.temperature]


class SlideflowMultiModal(nn.Module):
    """slideflow `MultiModal_Attention_MIL`: numbered encoders and scorers, a bag for each."""

    def __init__(self, width: int = 12, n_modes: int = 2) -> None:
        super().__init__()
        self.n_modes = n_modes
        for mode in range(n_modes):
            encoder = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
            attention = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
            self.add_module(f"encoder_{mode}", encoder)
            self.add_module(f"attention_{mode}", attention)
        self.head = nn.Linear(16 * n_modes, 2)

    def forward(self, *bags_and_lens):
        pooled = []
        for mode, (bags, lens) in enumerate(bags_and_lens):
            h = getattr(self, f"encoder_{mode}")(bags)
            scores = getattr(self, f"attention_{mode}")(h)
            pooled.append((_masked_softmax(scores, lens) * h).sum(1))
        return self.head(torch.cat(pooled, dim=1))


def _multimodal_loss(model: SlideflowMultiModal, batch: Batch) -> Tensor:
    bags, lens = features_of(model, batch), batch["mask"].sum(1)
    return F.cross_entropy(model(*[(bags, lens)] * model.n_modes), batch["label"])


def _multimodal_scores(model: SlideflowMultiModal, batch: Batch) -> list[Tensor]:
    rows = []
    for mode in range(model.n_modes):
        encoder = model.get_submodule(f"encoder_{mode}")
        scorer = model.get_submodule(f"attention_{mode}")
        h = relu(encoder[0], features_of(model, batch))
        rows.append(tanh_scores(h, scorer[0], scorer[2]))
    return [torch.cat(rows, dim=1)]


class MaskedLinear(nn.Linear):
    """owkin `MaskedLinear`: its output is -inf wherever the mask is True."""

    def forward(self, x, mask=None):
        scores = super().forward(x)
        return scores if mask is None else scores.masked_fill(mask, -torch.inf)


class OwkinGatedAttention(nn.Module):
    """owkin `GatedAttention`: masks inside the tap, returns the pooled bag and probabilities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.V, self.U, self.w = nn.Linear(width, 8), nn.Linear(width, 8), MaskedLinear(8, 1)

    def forward(self, features, mask=None):
        gated = torch.tanh(self.V(features)) * torch.sigmoid(self.U(features))
        attention = torch.softmax(self.w(gated, mask=mask), dim=1)
        return (attention.transpose(1, 2) @ features).squeeze(1), attention


class OwkinABMIL(nn.Module):
    """owkin `ABMIL`: three columns of coordinates in front; mask (bag, instance, 1), True = pad."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.tiles_emb = nn.Linear(width - 3, 16)
        self.attention_layer = OwkinGatedAttention(16)
        self.mlp = nn.Linear(16, 2)

    def forward(self, features, mask=None):
        pooled, _ = self.attention_layer(torch.sigmoid(self.tiles_emb(features[..., 3:])), mask)
        return self.mlp(pooled)


def owkin_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(features_of(model, batch), ~batch["mask"][..., None])
    return F.cross_entropy(logits, batch["label"])


def _owkin_scores(model: OwkinABMIL, batch: Batch) -> list[Tensor]:
    h = torch.sigmoid(linear(model.tiles_emb, features_of(model, batch)[..., 3:]))
    block = model.attention_layer
    return [gated_scores(h, block.V, block.U, block.w)]


class TridentABMIL(nn.Module):
    """TRIDENT `ABMIL`: one hidden layer and one branching layer per head; masks after the tap."""

    def __init__(self, heads: int = 2, branches: int = 2) -> None:
        super().__init__()
        hidden = [nn.Sequential(nn.Linear(16, 8), nn.Tanh()) for _ in range(heads)]
        self.attention_heads = nn.ModuleList(hidden)
        self.branching_layers = nn.ModuleList(nn.Linear(8, branches) for _ in range(heads))

    def forward(self, features, attn_mask=None):
        pooled, raw = [], []
        for hidden, branching in zip(self.attention_heads, self.branching_layers, strict=True):
            scores = branching(hidden(features))
            if attn_mask is not None:
                scores = scores.masked_fill(~attn_mask[..., None], -1e9)
            pooled.append(F.softmax(scores, dim=1).transpose(1, 2) @ features)
            raw.append(scores.transpose(1, 2))
        return torch.cat(pooled, dim=-1), torch.stack(raw, dim=2)


class TridentModel(nn.Module):
    """TRIDENT's slide encoder with a classifier: several distributions from one block."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.pre_attention = nn.Sequential(nn.Linear(width, 16), nn.ReLU())
        self.image_pooler = TridentABMIL()
        self.classifier = nn.Linear(64, 2)

    def forward(self, features, attn_mask=None):
        pooled, _ = self.image_pooler(self.pre_attention(features), attn_mask=attn_mask)
        return self.classifier(pooled.flatten(1))


def trident_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(features_of(model, batch), attn_mask=batch["mask"])
    return F.cross_entropy(logits, batch["label"])


def _trident_scores(model: TridentModel, batch: Batch) -> list[Tensor]:
    h, block = relu(model.pre_attention[0], features_of(model, batch)), model.image_pooler
    pairs = zip(block.attention_heads, block.branching_layers, strict=True)
    return [torch.cat([tanh_scores(h, hidden[0], last) for hidden, last in pairs], dim=1)]


# Cases --------------------------------------------------------------------------------------------


def builder(make: Callable[[], nn.Module], *paths: str, **options: float) -> Callable:
    """How to build the model with larger weights at these paths."""
    return lambda: sharp(make(), *paths, **options)


def wrapped(make: Callable[[], nn.Module]) -> Callable[[], MilLabModel]:
    """How to build a model of MIL-Lab in its wrapper."""
    return lambda: MilLabModel(make())


SCORES = [
    Case(
        name="amlab_attention",
        build=builder(AmlabAttention, "attention.2"),
        loss=amlab_loss,
        scores=_amlab_scores,
        site='AttentionSite("attention", layout="n r")',
        found="attention",
    ),
    Case(
        name="clam_sb",
        build=builder(ClamSB, "attention_net.3.attention_c"),
        loss=_clam_loss,
        scores=_clam_scores,
        site='AttentionSite("attention_net.3", layout="n r", output=0)',
        found="attention_net.3",
    ),
    Case(
        name="clam_sb_ungated",
        build=builder(lambda: ClamSB(gate=False), "attention_net.3.module.2"),
        loss=_clam_loss,
        scores=_clam_scores,
        site='AttentionSite("attention_net.-1", layout="n r", output=0)',
        found="attention_net.3.module",
    ),
    Case(
        name="clam_mb",
        build=builder(ClamMB, "attention_net.3.attention_c"),
        loss=_clam_loss,
        scores=_clam_scores,
        site='AttentionSite("attention_net.-1", layout="n r", output=0)',
        found="attention_net.3",
    ),
    Case(
        name="mhim_clam_sb",
        build=builder(MhimClamSB, "attention_net.2.attention_c"),
        loss=_mhim_clam_loss,
        scores=_clam_scores,
        site='AttentionSite("attention_net.-1", layout="b n r", output=0)',
        found="attention_net.2",
        n_bags=2,
    ),
    Case(
        name="mhim_dattention",
        build=builder(MhimDAttention, "attention.2"),
        loss=_mhim_loss,
        scores=_mhim_scores,
        site='AttentionSite("attention", layout="b n r")',
        found="attention",
        n_bags=2,
    ),
    Case(
        name="acmil_abmil",
        build=builder(AcmilABMIL, "attention.attention_weights"),
        loss=_acmil_abmil_loss,
        scores=_acmil_scores,
        site='AttentionSite("attention", layout="r n")',
        found="attention",
    ),
    Case(
        name="aem_acmil",
        build=builder(AemACMIL, "attention.attention_weights"),
        loss=_aem_loss,
        scores=_acmil_scores,
        site='AttentionSite("attention", layout="r n")',
        found="attention",
    ),
    Case(
        name="acmil_ga",
        build=builder(AcmilGA, "attention.attention_weights"),
        loss=_acmil_loss,
        scores=_acmil_scores,
        site='AttentionSite("attention", layout="r n")',
        found="attention",
        plain=False,
    ),
    Case(
        name="asmil_sigmax",
        build=builder(AsmilMYGA, "attention.attention_weights"),
        loss=_acmil_loss,
        scores=_acmil_scores,
        site='AttentionSite("attention", layout="r n")',
        found=None,
        plain=False,
    ),
    Case(
        name="acmil_mha",
        build=builder(AcmilMHA, "attention.k_proj", factor=6.0),
        loss=_acmil_abmil_loss,
        scores=_acmil_mha_scores,
        site='AttentionSite("attention", layout="r 1 n", output=1)',
        found=None,  # the query is outside the scorer, the values are inside
    ),
    Case(
        name="acmil_acmil_mha",
        build=builder(AcmilACMILMHA, *(f"sub_attention.{i}.k_proj" for i in range(3)), factor=6.0),
        loss=_acmil_loss,
        scores=_acmil_acmil_mha_scores,
        site='AttentionSite("sub_attention.*", layout="r 1 n", output=1)',
        found=None,  # as above
    ),
    Case(
        name="acmil_ibmil",
        build=builder(AcmilIBMIL, "attention.attention_weights"),
        loss=_ibmil_loss,
        scores=_acmil_scores,
        site='AttentionSite("attention", layout="r n")',
        found="attention",
    ),
    Case(
        name="acmil_clam_mb_softmax_one",
        build=builder(lambda: AcmilClamMB(dropout=False), "attention_net.2.attention_c"),
        loss=_clam_loss,
        scores=_clam_scores,
        site='AttentionSite("attention_net.-1", layout="n r", output=0)',
        found="attention_net.2",
        plain=False,
    ),
    Case(
        name="dtfd",
        build=builder(Dtfd, "attention.attention_weights"),
        loss=_dtfd_loss,
        scores=_dtfd_scores,
        site='AttentionSite("attention", tap="attention_weights", layout="n r")',
        found=None,
    ),
    Case(
        name="millab_abmil",
        build=builder(wrapped(MilLabABMIL), "model.global_attn.attention_c"),
        loss=millab_masked_loss,
        scores=_millab_abmil_scores,
        site='AttentionSite("model.global_attn", layout="b n r")',
        found="model.global_attn",
        n_bags=3,
        padded=True,
    ),
    Case(
        name="millab_clamsb",
        build=builder(wrapped(MilLabCLAMSB), "model.global_attn.attention_c"),
        loss=millab_loss,
        scores=_millab_abmil_scores,
        site='AttentionSite("model.global_attn", layout="n r")',
        found="model.global_attn",
    ),
    Case(
        name="millab_dftd",
        build=builder(wrapped(MilLabDFTD), "model.attention.attention_c"),
        loss=millab_loss,
        scores=_dftd_scores,
        site='AttentionSite("model.attention", layout="n r")',
        found=None,
        plain=False,
    ),
    Case(
        name="millab_rrtmil",
        build=builder(wrapped(MilLabRRTMIL), "model.encoder.pool_fn.attention.attention.2"),
        loss=millab_loss,
        scores=_rrt_scores,
        site='AttentionSite("model.encoder.pool_fn", tap="attention.attention", layout="b n r")',
        found="model.encoder.pool_fn.attention.attention",
        n_bags=2,
    ),
    Case(
        name="millab_wikgmil",
        build=builder(wrapped(MilLabWIKGMIL), "model.readout.gate_nn.2", factor=24.0),
        loss=millab_loss,
        scores=_wikg_scores,
        site='AttentionSite("model.readout.gate_nn", layout="n r")',
        found="model.readout.gate_nn",
    ),
    Case(
        name="slideflow_attention_mil",
        build=builder(SlideflowAttentionMIL, "attention.2", factor=24.0),
        loss=_slideflow_loss,
        scores=_slideflow_scores,
        site='AttentionSite("attention", layout="b n r", scale="1/temperature")',
        found="attention",
        n_bags=3,
        padded=True,
    ),
    Case(
        name="slideflow_multimodal",
        build=builder(SlideflowMultiModal, "attention_0.2", "attention_1.2"),
        loss=_multimodal_loss,
        scores=_multimodal_scores,
        site='AttentionSite("attention_[0-9]*", layout="b n r")',
        found=None,
        n_bags=3,
        padded=True,
    ),
    Case(
        name="owkin_abmil",
        build=builder(OwkinABMIL, "attention_layer.w", factor=24.0),
        loss=owkin_loss,
        scores=_owkin_scores,
        site='AttentionSite("attention_layer", tap="w", layout="b n r", mask="~mask")',
        found="attention_layer",
        n_bags=3,
        padded=True,
    ),
    Case(
        name="trident_abmil",
        build=builder(
            TridentModel, "image_pooler.branching_layers.0", "image_pooler.branching_layers.1"
        ),
        loss=trident_loss,
        scores=_trident_scores,
        site=(
            'AttentionSite("image_pooler", tap="branching_layers.*", layout="b n r", '
            'mask="attn_mask")'
        ),
        found=None,
        n_bags=3,
        padded=True,
    ),
]
