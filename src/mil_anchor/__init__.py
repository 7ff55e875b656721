"""Attention MIL models that keep their attention steady: a PyTorch Lightning plug-in."""

from mil_anchor.attention import normalized_sigmoid
from mil_anchor.callbacks.anchor import AnchorCallback
from mil_anchor.callbacks.monitor import AttentionMonitor
from mil_anchor.callbacks.random_state import RandomState
from mil_anchor.callbacks.regularizer import AttentionRegularizer
from mil_anchor.site import AttentionSite, find_site, register_site

__all__ = [
    "AnchorCallback",
    "AttentionMonitor",
    "AttentionRegularizer",
    "AttentionSite",
    "RandomState",
    "find_site",
    "normalized_sigmoid",
    "register_site",
]
