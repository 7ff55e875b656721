"""Attention MIL models that keep their attention steady: a PyTorch Lightning plug-in."""

from mil_anchor.attention import normalized_sigmoid
from mil_anchor.callbacks.aem import AEMCallback
from mil_anchor.callbacks.anchor import AnchorCallback
from mil_anchor.callbacks.bag_features import BagFeatures
from mil_anchor.callbacks.monitor import AttentionMonitor
from mil_anchor.callbacks.random_state import RandomState
from mil_anchor.callbacks.regularizer import AttentionRegularizer
from mil_anchor.callbacks.slow import SlowWeights
from mil_anchor.callbacks.temporal import TemporalEnsembleCallback
from mil_anchor.sites.base import Site
from mil_anchor.sites.critical import CriticalInstanceSite
from mil_anchor.sites.encoder import EncoderSite
from mil_anchor.sites.gated import GatedSite
from mil_anchor.sites.products import ClassTokenSite, MultiheadSite
from mil_anchor.sites.registry import find_site, register_site
from mil_anchor.sites.score import AttentionSite

__all__ = [
    "AEMCallback",
    "AnchorCallback",
    "AttentionMonitor",
    "AttentionRegularizer",
    "AttentionSite",
    "BagFeatures",
    "ClassTokenSite",
    "CriticalInstanceSite",
    "EncoderSite",
    "GatedSite",
    "MultiheadSite",
    "RandomState",
    "Site",
    "SlowWeights",
    "TemporalEnsembleCallback",
    "find_site",
    "normalized_sigmoid",
    "register_site",
]
