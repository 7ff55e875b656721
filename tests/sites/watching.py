"""Runs a model once under the watch, as the first training step does."""

import torch

from mil_anchor import AttentionSite
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.callbacks.watch import StepWatch
from mil_anchor.sites.discovery import discover
from mil_anchor.sites.proof import find_difference


def read(model, site, batch, *inputs):
    """What the site reads of one forward, and what differs from the model's softmax."""
    site = AttentionSite(site) if isinstance(site, str) else site
    recorder, watch = AttentionRecorder(model, site, only_with_grad=True), StepWatch(model)
    with watch:
        recorder.start()
        model(*(inputs or (batch["features"],)))
        with watch.paused():
            attention = recorder.take(batch)
            difference = find_difference(recorder.site, attention, watch.seen)
    recorder.remove()
    watch.remove()
    return attention, difference


def find(model, features, *, loss=None, n_bags=None):
    """The site that discovery finds."""
    watch = StepWatch(model)
    watch.watch_calls()
    with watch:
        output = model(features)
        loss = output.square().sum() if loss is None else loss(output)
        try:
            with watch.paused():
                return discover(model, watch.calls, watch.seen, loss=loss, n_bags=n_bags)
        finally:
            watch.remove()


def bag(n_bags=1, n_instances=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_bags, n_instances, width, generator=generator)
