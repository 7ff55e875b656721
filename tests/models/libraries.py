"""Models of torchmil 1.0.2 and MONAI 1.6.1, each with its attention written from the formulas."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import milmodel
from torch import nn
from torchmil import models
from torchmil import nn as layers

from tests.models.case import Case

WIDTH = 12
_POOL = 'AttentionSite("pool", tap="{}", layout="b n r")'


@contextmanager
def _seeded() -> Iterator[None]:
    """The same draws at every call: torchmil draws from both global generators."""
    state = np.random.get_state()  # noqa: NPY002 - torchmil's generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _chain(batch):
    """A dense graph that joins neighbours in the bag, normalised by the degrees as Sm needs it."""
    real = batch["mask"].to(batch["features"].dtype)
    joined = real[:, :-1] * real[:, 1:]
    adjacency = torch.diag_embed(joined, 1) + torch.diag_embed(joined, -1)
    root = adjacency.sum(dim=-1).clamp(min=1).sqrt()
    return adjacency / (root.unsqueeze(1) * root.unsqueeze(2))


def _inputs(batch, *, graph=False, masked=True):
    """What the models take beside the features."""
    graph_input = {"adj": _chain(batch)} if graph else {}
    return graph_input | ({"mask": batch["mask"]} if masked else {})


def _own_loss(model, batch, **kinds):
    with _seeded():
        _, losses = model.compute_loss(batch["label"], batch["features"], **_inputs(batch, **kinds))
    return sum(losses.values())


_graph_loss = partial(_own_loss, graph=True)


def _linear(layer, x):
    layer = getattr(layer, "module", layer)  # torchmil's LazyLinear holds the layer
    return F.linear(x, layer.weight, layer.bias)


def _pool_scores(pool, x):
    hidden = torch.tanh(_linear(pool.fc1, x))
    if pool.gated:
        hidden = hidden * torch.sigmoid(_linear(pool.fc_gated, x))
    return _linear(pool.fc2, hidden).transpose(1, 2)


def _abmil_scores(model, batch):
    return [_pool_scores(model.pool, batch["features"])]


def _transformer_abmil_scores(model, batch):
    return [_pool_scores(model.pool, model.transformer_encoder(batch["features"], batch["mask"]))]


def _vaeabmil_scores(model, batch):
    with _seeded():
        return [_pool_scores(model.pool, model.feat_ext(batch["features"]).mean(dim=2))]


def _patch_gcn_scores(model, batch):
    adjacency, x = _chain(batch), batch["features"]
    collected = [x]
    for layer in model.gcn_layers:
        x = layer(x, adjacency)
        collected.append(x)
    x = torch.cat(collected, dim=2)
    for layer in model.mlp:
        x = layer(x)
    return [_pool_scores(model.pool, x)]


def _camil_scores(model, batch):
    x = model.nystrom_transformer_layer(_linear(model.fc1, batch["features"]))
    return [_pool_scores(model.camil_att_pool, x)]


def _deepgraphsurv_scores(model, batch):
    adjacency, x = _chain(batch), batch["features"]
    for layer in model.layers_att:
        x = torch.relu(layer(x, adjacency))
    return [_linear(model.proj1d, x).transpose(1, 2)]


def _sm(x, adjacency, operator):
    """The operator Sm: G(t) = alpha A G(t - 1) + (1 - alpha) U, ten times."""
    alpha = 1 / (1 + operator.sm.coef)
    smoothed = x
    for _ in range(10):
        smoothed = (1 - alpha) * x + alpha * adjacency @ smoothed
    return smoothed


def _sm_scores(pool, x, adjacency):
    if pool.sm_where == "early":
        x = _sm(x, adjacency, pool.sm)
    scores = _linear(pool.proj2, torch.tanh(_linear(pool.proj1, x)))
    if pool.sm_where == "late":
        scores = _sm(scores, adjacency, pool.sm)
    return [scores.transpose(1, 2)]


def _sm_abmil_scores(model, batch):
    return _sm_scores(model.pool, batch["features"], _chain(batch))


def _sm_transformer_abmil_scores(model, batch):
    x = model.transformer_encoder(batch["features"], **_inputs(batch, graph=True))
    return _sm_scores(model.pool, x, _chain(batch))


def _mean_scores(pool, x):
    """The mean of the Gaussian that a probabilistic pool draws its scores from."""
    hidden = F.gelu(_linear(pool.in_mlp[2], F.gelu(_linear(pool.in_mlp[0], x))))
    return [_linear(pool.mu_f_nn, hidden).transpose(1, 2)]


def _smooth_abmil_scores(model, batch):
    return _mean_scores(model.pool, batch["features"])


def _transformer_prob_scores(model, batch):
    return _mean_scores(model.pool, model.transformer_encoder(batch["features"], batch["mask"]))


def _dsmil_scores(model, batch):
    x = batch["features"]
    if isinstance(model.q_nn, nn.Sequential):
        query = torch.tanh(_linear(model.q_nn[2], torch.relu(_linear(model.q_nn[0], x))))
    else:
        query = _linear(model.q_nn, x)
    # Among all instances: torchmil's critical instance may be a padded one.
    critical = _linear(model.inst_classifier, x)[..., 0].argmax(dim=1)
    chosen = query[range(len(x)), critical]
    return [(chosen.unsqueeze(1) @ query.transpose(1, 2)) / query.shape[-1] ** 0.5]


def _dtfdmil_scores(model, batch):
    with _seeded():
        order = np.arange(batch["features"].shape[1])
        np.random.shuffle(order)  # noqa: NPY002
    groups = np.array_split(order, model.n_groups)
    return [_pool_scores(model.attention_pool, batch["features"][:, group]) for group in groups]


def _class_token_row(attention, tokens, n_instances):
    """Products of the class token's query, the first token, with the instances' keys, per head."""
    query, key, _ = (
        part.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        for part in F.linear(tokens, attention.qkv_nn.weight).chunk(3, dim=-1)
    )
    row = query[:, :, :1] @ key[:, :, 1 : n_instances + 1].transpose(2, 3)
    return [row.squeeze(2) / query.shape[-1] ** 0.5]


def _transmil_scores(model, batch):
    x = _linear(model.fc1, batch["features"])
    n_instances = x.shape[1]
    side = int(np.ceil(np.sqrt(n_instances)))
    class_token = model.cls_token.expand(len(x), -1, -1)
    tokens = torch.cat([class_token, x, x[:, : side**2 - n_instances]], dim=1)
    first, *middle, last = model.layers
    tokens = model.pos_layer(first(tokens), side, side)
    for layer in middle:
        tokens = layer(tokens)
    return _class_token_row(last.att_module, last.norm1(tokens), n_instances)


def _iibmil(**options):
    model = models.IIBMIL(**options)
    # torchmil starts from a class token of zeros, for which every score is zero.
    nn.init.normal_(model.cls_token)
    return model


def _iibmil_scores(model, batch):
    x = model.encoder(batch["features"], batch["mask"])
    tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    *earlier, last = model.decoder.layers
    assert not earlier
    return _class_token_row(last.att_module, last.norm1(tokens), x.shape[1])


def _vaeabmil(**options):
    encoder = layers.VariationalAutoEncoderMIL(input_shape=(WIDTH,), layer_sizes=[16, 8])
    return models.VAEABMIL(encoder, **options)


class _Backbone(nn.Module):
    """Stands in for torchvision's ResNet-50, the only backbone of MONAI's pyramid.

    torchvision has no build for a CPU torch on the package index. The widths are the ResNet's.
    """

    def __init__(self, weights=None) -> None:
        super().__init__()
        for stage, (inner, outer) in enumerate([(3, 256), (256, 512), (512, 1024), (1024, 2048)]):
            self.add_module(f"layer{stage + 1}", nn.Conv2d(inner, outer, kernel_size=1))
        self.fc = nn.Linear(2048, 1000)

    def stages(self, x):
        outputs = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(torch.relu(x) if outputs else x)
            outputs.append(x)
        return outputs

    def forward(self, x):
        return self.fc(self.stages(x)[-1].mean(dim=(2, 3)))


def _monai(mode, width):
    own = {"backbone": nn.Flatten(), "backbone_num_features": width}
    if mode == "att_trans_pyramid":
        own = {"backbone": None}
    with (
        warnings.catch_warnings(),
        mock.patch.object(milmodel, "models", SimpleNamespace(resnet50=_Backbone)),
    ):
        # MONAI's encoders are not batch-first, which torch says whenever one is built.
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        return milmodel.MILModel(2, mode, pretrained=False, trans_blocks=1, **own)


def _images(batch):
    """Features as the pixels that MONAI takes: (bag, instance, 3, height, 1)."""
    return batch["features"].unflatten(-1, (3, -1, 1))


def _monai_loss(model, batch):
    return F.cross_entropy(model(_images(batch)), batch["label"])


def _monai_scores(model, batch):
    x = batch["features"].transpose(0, 1)  # its encoders have the instance axis first
    if model.mil_mode == "att_trans":
        x = model.transformer(x)
    if model.mil_mode == "att_trans_pyramid":
        images = _images(batch)
        stages = [
            stage.mean(dim=(2, 3)).unflatten(0, images.shape[:2]).transpose(0, 1)
            for stage in model.net.stages(images.flatten(0, 1))
        ]
        x = model.transformer[0](stages[0])
        for encoder, stage in zip(model.transformer[1:], stages[1:], strict=True):
            x = encoder(torch.cat([x, stage], dim=2))
    hidden = torch.tanh(_linear(model.attention[0], x))
    return [_linear(model.attention[2], hidden).permute(1, 2, 0)]


def _own_modules(build, **options):
    """A copy: the modules that torchmil's arguments have as defaults belong to all its models."""
    return copy.deepcopy(build(in_shape=(WIDTH,), **options))


def _torchmil(name, build, scores, site, found=None, *, loss=_own_loss, n_bags=2, **options):
    more = {"padded": True} | {key: options.pop(key) for key in Case._fields if key in options}
    return Case(
        f"torchmil_{name}",
        partial(_own_modules, build, **options),
        loss,
        scores,
        site,
        found,
        n_bags=n_bags,
        width=WIDTH,
        **more,
    )


_FC2 = _POOL.format("fc2")
_MEAN = _POOL.format("mu_f_nn")
_ENCODER = {"transf_att_dim": 16, "transf_n_heads": 4}
_SAMPLES = {"n_samples_train": 5, "n_samples_test": 5}

LIBRARIES: list[Case] = [
    _torchmil("abmil", models.ABMIL, _abmil_scores, _FC2, "pool", att_dim=16, n_bags=3),
    _torchmil(
        "abmil_gated", models.ABMIL, _abmil_scores, _FC2, "pool", att_dim=16, gated=True, n_bags=3
    ),
    _torchmil("clam_sb", models.CLAM_SB, _abmil_scores, _FC2, "pool", att_dim=16, k_sample=3),
    _torchmil(
        "transformer_abmil",
        models.TransformerABMIL,
        _transformer_abmil_scores,
        _FC2,
        "pool",
        pool_att_dim=16,
        **_ENCODER,
    ),
    _torchmil(
        "sm_abmil_early",
        models.SmABMIL,
        _sm_abmil_scores,
        _POOL.format("proj2"),
        "pool.proj1+pool.proj2",  # its smoothing acts on the pooled features, too
        loss=_graph_loss,
        att_dim=16,
        sm_where="early",
    ),
    _torchmil(
        "sm_abmil_late",
        models.SmABMIL,
        _sm_abmil_scores,
        _POOL.format("sm"),
        "pool",
        loss=_graph_loss,
        att_dim=16,
        sm_where="late",
    ),
    _torchmil(
        "sm_transformer_abmil",
        models.SmTransformerABMIL,
        _sm_transformer_abmil_scores,
        _POOL.format("proj2"),
        "pool.proj1+pool.proj2",  # its smoothing acts on the pooled features, too
        loss=_graph_loss,
        pool_att_dim=16,
        **_ENCODER,
    ),
    _torchmil(
        "smooth_abmil",
        models.SmoothABMIL,
        _smooth_abmil_scores,
        _MEAN,
        "pool",
        loss=_graph_loss,
        att_dim=8,
    ),
    _torchmil(
        "prob_smooth_abmil",
        models.ProbSmoothABMIL,
        _smooth_abmil_scores,
        _MEAN,
        loss=_graph_loss,
        plain=False,
        att_dim=8,
        **_SAMPLES,
    ),
    _torchmil(
        "transformer_prob_smooth_abmil",
        models.TransformerProbSmoothABMIL,
        _transformer_prob_scores,
        _MEAN,
        loss=_graph_loss,
        plain=False,
        pool_att_dim=8,
        **_ENCODER,
        **_SAMPLES,
    ),
    _torchmil("vaeabmil", _vaeabmil, _vaeabmil_scores, _FC2, "pool", att_dim=16),
    _torchmil(
        "dsmil",
        models.DSMIL,
        _dsmil_scores,
        'CriticalInstanceSite("q_nn", classifier="inst_classifier")',
        att_dim=16,
        nonlinear_q=True,
        nonlinear_v=True,
    ),
    _torchmil(
        "dsmil_linear",
        models.DSMIL,
        _dsmil_scores,
        'CriticalInstanceSite("q_nn", classifier="inst_classifier")',
        att_dim=16,
    ),
    _torchmil(
        "dtfdmil",
        models.DTFDMIL,
        _dtfdmil_scores,
        'AttentionSite("attention_pool", tap="fc2", layout="b n r", mask="mask")',
        att_dim=16,
        n_groups=3,
    ),
    _torchmil(
        "patch_gcn",
        models.PatchGCN,
        _patch_gcn_scores,
        _FC2,
        "pool",
        loss=_graph_loss,
        n_gcn_layers=2,
        att_dim=16,
    ),
    # Its attention branch begins before the site, in layers that no module holds together.
    _torchmil(
        "deepgraphsurv",
        models.DeepGraphSurv,
        _deepgraphsurv_scores,
        'AttentionSite("proj1d", layout="b n r")',
        "layers_att.0+proj1d.module",
        loss=_graph_loss,
        att_dim=16,
    ),
    _torchmil(
        "camil",
        models.CAMIL,
        _camil_scores,
        'AttentionSite("camil_att_pool", tap="fc2", layout="b n r")',
        "camil_att_pool",
        loss=_graph_loss,
        nystrom_att_dim=16,
        pool_att_dim=16,
        gated_pool=True,
        n_landmarks=4,
    ),
    _torchmil(
        "transmil",
        models.TransMIL,
        _transmil_scores,
        'ClassTokenSite("layers.-1.att_module.qkv_nn")',
        loss=partial(_own_loss, masked=False),
        proven=False,
        padded=False,
        att_dim=16,
        n_heads=4,
    ),
    _torchmil(
        "iibmil",
        _iibmil,
        _iibmil_scores,
        'ClassTokenSite("decoder.layers.-1.att_module.qkv_nn", squared=False)',
        att_dim=16,
        n_heads=4,
    ),
    *(
        Case(
            f"monai_{mode}",
            partial(_monai, mode, width),
            _monai_loss,
            _monai_scores,
            'AttentionSite("attention", layout="b n r")',
            "attention",
            n_bags=2,
            width=width,
        )
        # The eight heads of att_trans need a width that they divide, the pixels one that 3 divides.
        for mode, width in (("att", 12), ("att_trans", 24), ("att_trans_pyramid", 12))
    ),
]
