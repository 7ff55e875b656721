"""A published model in a module such as its user would write; it knows nothing of mil_anchor."""

import torch
from torch import nn
from torchmil.models.abmil import ABMIL

from tests.callbacks.tiny import Recipe, make_batches


def make_abmil(dropout=0.3):
    """Gated ABMIL as torchmil has it, small."""
    encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout))
    # Its default criterion is one object that all models share, training mode included.
    criterion = nn.BCEWithLogitsLoss()
    model = ABMIL(in_shape=(4,), att_dim=6, gated=True, feat_ext=encoder, criterion=criterion)
    with torch.no_grad():  # far from uniform, so that the divergence matters
        model.pool.fc2.weight.mul_(8)
    return model


class TorchmilModule(Recipe):
    """Trains it with its own `compute_loss` on padded bags."""

    def __init__(self, *, dropout=0.3, **options) -> None:
        super().__init__(**options)
        self.model = make_abmil(dropout)

    def loss(self, batch):
        _, losses = self.model.compute_loss(batch["label"], batch["features"], batch["mask"])
        return sum(losses.values())


def make_padded_batches(n_batches=6, n_bags=2, n_instances=7, seed=0):
    """Bags of different lengths; what stands in their padding must not matter."""
    batches = make_batches(n_batches, n_bags, n_instances, seed)
    for batch in batches:
        lengths = n_instances - 2 * (torch.arange(n_bags) % 3)
        batch["mask"] = torch.arange(n_instances) < lengths[:, None]
        batch["features"][~batch["mask"]] = 9.0
    return batches
