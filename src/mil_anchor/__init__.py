"""Attention MIL models that keep their attention steady: a PyTorch Lightning plug-in."""

from mil_anchor.attention import normalized_sigmoid
from mil_anchor.callbacks.anchor import AnchorCallback
from mil_anchor.callbacks.monitor import AttentionMonitor
from mil_anchor.callbacks.random_state import RandomState
from mil_anchor.callbacks.regularizer import AttentionRegularizer
from mil_anchor.sites.base import Site
from mil_anchor.sites.critical import CriticalInstanceSite
from mil_anchor.sites.gated import GatedSite
from mil_anchor.sites.products import ClassTokenSite, MultiheadSite
from mil_anchor.sites.registry import find_site, register_site
from mil_anchor.sites.score import AttentionSite

__all__ = [
    "AnchorCallback",
    "AttentionMonitor",
    "AttentionRegularizer",
    "AttentionSite",
    "ClassTokenSite",
    "CriticalInstanceSite",
    "GatedSite",
    "MultiheadSite",
    "RandomState",
    "Site",
    "find_site",
    "normalized_sigmoid",
    "register_site",
]
