"""Implementations whose attention is known: a class, where it comes from, its site."""

from typing import NamedTuple

from mil_anchor.sites.base import Site
from mil_anchor.sites.critical import CriticalInstanceSite
from mil_anchor.sites.gated import GatedSite
from mil_anchor.sites.products import ClassTokenSite, MultiheadSite
from mil_anchor.sites.score import AttentionSite


class Known(NamedTuple):
    """One row of the table.

    Args:
        name: ``"package.module.Class"``, or the bare name of a class that is found in copies.
        site: Its attention.
        source: Who published it.
        when: ``"attribute=value"`` of the model for which the site holds; empty: always.
        note: What its user must know.
    """

    name: str
    site: Site
    source: str
    when: str = ""
    note: str = ""


def _baseline(name: str, site: AttentionSite) -> Known:
    return Known(f"baselines.{name}", site, "mil_anchor")


def _torchmil(name: str, site: Site, **more: str) -> Known:
    return Known(f"torchmil.models.{name}", site, "torchmil", **more)


_OWN_TRANSMIL = AttentionSite(
    "layers.-1.attention.query_key",
    layout="b r n",
    surrogate=True,
    mixing="layers.-1.attention.mixing_row",
)
_OWN_POOL = AttentionSite("attention", layout="b n r", output=0)
_POOL = AttentionSite("pool", tap="fc2", layout="b n r")
_SM_POOL = AttentionSite("pool", tap="proj2", layout="b n r")
_LATE_SM_POOL = AttentionSite("pool", tap="sm", layout="b n r")
_MEAN_POOL = AttentionSite("pool", tap="mu_f_nn", layout="b n r")
_TRANSMIL = ClassTokenSite("layer2.attn.to_qkv")
_SAMPLES = "The model softmaxes samples around these scores, not the scores: strict=False."
_ONE = "Its softmax has a one in the denominator, so its rows sum to less than one: strict=False."
_TRAIN_MASK = "In training it masks its highest scores after the scorer: strict=False."
_OTHER_TEMPERATURE = "In training it draws a temperature for each bag: strict=False."
_NOT_NORMALIZED = "It weights features by raw scores, without a softmax: strict=False."
_GROUPS = "Each pseudo-bag is a distribution of its own; the second tier is not regularised."

KNOWN_MODELS = (
    _baseline("abmil.ABMIL", _OWN_POOL),
    _baseline("clam.CLAMSB", _OWN_POOL),
    _baseline("clam.CLAMMB", _OWN_POOL),
    _baseline("transmil.TransMIL", _OWN_TRANSMIL),
    _baseline("dsmil.DSMIL", AttentionSite("attention", layout="b r n")),
    _baseline("asmil.ASMIL", AttentionSite("attention", layout="b n r")),
    _torchmil("abmil.ABMIL", _POOL),
    _torchmil("clam.CLAM_SB", _POOL),
    _torchmil("transformer_abmil.TransformerABMIL", _POOL),
    _torchmil("vaeabmil.VAEABMIL", _POOL),
    _torchmil("patch_gcn.PatchGCN", _POOL),
    _torchmil("sm_abmil.SmABMIL", _LATE_SM_POOL, when="pool.sm_where=late"),
    _torchmil("sm_abmil.SmABMIL", _SM_POOL),
    _torchmil("sm_transformer_abmil.SmTransformerABMIL", _LATE_SM_POOL, when="pool.sm_where=late"),
    _torchmil("sm_transformer_abmil.SmTransformerABMIL", _SM_POOL),
    _torchmil("prob_smooth_abmil.SmoothABMIL", _MEAN_POOL),
    _torchmil("prob_smooth_abmil.ProbSmoothABMIL", _MEAN_POOL, note=_SAMPLES),
    _torchmil(
        "transformer_prob_smooth_abmil.TransformerProbSmoothABMIL", _MEAN_POOL, note=_SAMPLES
    ),
    _torchmil("camil.CAMIL", AttentionSite("camil_att_pool", tap="fc2", layout="b n r")),
    _torchmil(
        "deepgraphsurv.DeepGraphSurv",
        AttentionSite("proj1d", layout="b n r"),
        note="The anchor mirrors the last layer of its attention network.",
    ),
    _torchmil(
        "dtfdmil.DTFDMIL",
        AttentionSite("attention_pool", tap="fc2", layout="b n r", mask="mask"),
        note=_GROUPS,
    ),
    _torchmil("dsmil.DSMIL", CriticalInstanceSite("q_nn", classifier="inst_classifier")),
    _torchmil("transmil.TransMIL", ClassTokenSite("layers.-1.att_module.qkv_nn")),
    _torchmil(
        "iibmil.IIBMIL", ClassTokenSite("decoder.layers.-1.att_module.qkv_nn", squared=False)
    ),
    Known(
        "monai.networks.nets.milmodel.MILModel",
        AttentionSite("attention", layout="b n r"),
        "MONAI",
        note="Modes att, att_trans and att_trans_pyramid.",
    ),
    # Code that is copied from project to project: by the class's name and the blocks it has.
    Known(
        "GatedAttention",
        GatedSite("attention_V", "attention_U", "attention_w"),
        "ABMIL (official)",
    ),
    Known("Attention", AttentionSite("attention"), "ABMIL (official)"),
    Known("CLAM_SB", AttentionSite("attention_net.-1", output=0), "CLAM, ACMIL, AEM, MHIM-MIL"),
    Known(
        "CLAM_MB",
        AttentionSite("attention_net.-1", output=0),
        "CLAM, MHIM-MIL; ACMIL, AEM",
        note=f"ACMIL's and AEM's copy: {_ONE[0].lower()}{_ONE[1:]}",
    ),
    Known("TransMIL", _TRANSMIL, "TransMIL, ACMIL, AEM, ASMIL, MHIM-MIL, slideflow, STAMP"),
    Known("TransMIL", ClassTokenSite("blocks.-1.attention.to_qkv"), "MIL-Lab"),
    Known("TransMIL", ClassTokenSite("agg.attn.to_qkv"), "owkin"),
    Known("TransMIL", ClassTokenSite("agg.attn.qkv"), "owkin"),
    Known("MILNet", CriticalInstanceSite("b_classifier.q"), "DSMIL, ACMIL, AEM, ASMIL, MHIM-MIL"),
    Known("DSMIL", CriticalInstanceSite("b_classifier.q"), "MIL-Lab"),
    Known("ABMIL", AttentionSite("global_attn"), "MIL-Lab"),
    Known("ABMIL", AttentionSite("attention_layer", tap="w"), "owkin"),
    Known("ABMIL", AttentionSite("attention"), "ACMIL, AEM, ASMIL"),
    Known("ACMIL_GA", AttentionSite("attention"), "ACMIL", note=_TRAIN_MASK),
    Known(
        "ACMIL_MHA",
        AttentionSite("sub_attention.*", layout="r 1 n", output=1),
        "ACMIL",
        note=_TRAIN_MASK,
    ),
    Known("ACMIL_MYMHA", AttentionSite("sub_attention.*", layout="r 1 n", output=1), "ASMIL"),
    Known("MHA", AttentionSite("attention", layout="r 1 n", output=1), "ACMIL, AEM"),
    Known("IBMIL", AttentionSite("attention"), "ACMIL, AEM"),
    Known("ACMIL", AttentionSite("attention"), "AEM"),
    Known("AttnMIL1", AttentionSite("attention"), "AEM", note=_OTHER_TEMPERATURE),
    Known("AttnMIL3", AttentionSite("attention"), "AEM"),
    Known("ILRA", MultiheadSite("pooling.mha", tap="multihead_attn"), "ACMIL, AEM"),
    Known("ILRA", MultiheadSite("pooling.mha", tap="multihead_attention"), "MIL-Lab"),
    Known("DAttention", AttentionSite("attention"), "ACMIL, AEM, MHIM-MIL"),
    Known(
        "AttentionGated",
        GatedSite("attention_a", "attention_b", "attention_c"),
        "ACMIL, AEM, ASMIL, MHIM-MIL",
    ),
    Known("CLAMSB", AttentionSite("global_attn"), "MIL-Lab"),
    Known("Transformer", MultiheadSite("blocks.-1.attention", class_token=True), "MIL-Lab"),
    Known("DFTD", AttentionSite("attention"), "MIL-Lab", note=_NOT_NORMALIZED),
    Known("RRTMIL", AttentionSite("encoder.pool_fn", tap="attention.attention_c"), "MIL-Lab"),
    Known("RRTMIL", AttentionSite("encoder.pool_fn", tap="attention.attention"), "MIL-Lab"),
    Known("WIKGMIL", AttentionSite("readout.gate_nn", layout="n r"), "MIL-Lab"),
    Known("Attention_MIL", AttentionSite("attention", scale="1/temperature"), "slideflow"),
    Known("MultiModal_Attention_MIL", AttentionSite("attention_[0-9]*"), "slideflow"),
    Known(
        "Transformer",
        ClassTokenSite("transformer.layers.-1.0.fn.to_qkv", squared=False),
        "slideflow (bistro)",
    ),
)
