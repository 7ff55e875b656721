"""ABMIL and DSMIL as a reader of their papers would write them: one bag, no mask, nothing tuned."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextbookABMIL(nn.Module):
    """Gated attention pooling (Ilse et al., 2018, eq. 7 and 9)."""

    def __init__(self, in_features: int, n_classes: int, *, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
        self.content = nn.Sequential(nn.Linear(hidden, 128), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(hidden, 128), nn.Sigmoid())
        self.scorer = nn.Linear(128, 1)
        self.head = nn.Linear(hidden, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of a bag, (1, instance, width)."""
        instances = self.projection(features[0])
        scores = self.scorer(self.content(instances) * self.gate(instances))
        attention = scores.T.softmax(dim=1)
        logits: Tensor = self.head(attention @ instances)
        return logits


class DSMILOutput(NamedTuple):
    """Logits of the bag stream, and half the cross-entropy of the instance stream."""

    logits: Tensor
    auxiliary_loss: Tensor | None
    bag_loss_weight: float = 0.5


class TextbookDSMIL(nn.Module):
    """Two streams (Li et al., 2021), queries of two layers as in their experiments."""

    def __init__(self, in_features: int, n_classes: int) -> None:
        super().__init__()
        self.instance_classifier = nn.Linear(in_features, n_classes)
        self.query = nn.Sequential(
            nn.Linear(in_features, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh()
        )
        self.head = nn.Conv1d(n_classes, n_classes, kernel_size=in_features)

    def forward(self, features: Tensor, label: Tensor | None = None) -> DSMILOutput:
        """Logits of a bag, (1, instance, width)."""
        instances = features[0]
        instance_logits = self.instance_classifier(instances)
        order = instance_logits.sort(dim=0, descending=True).indices
        critical = instances[order[0]]
        queries, critical_queries = self.query(instances), self.query(critical)
        products = queries @ critical_queries.T / math.sqrt(queries.shape[1])
        bag = products.softmax(dim=0).T @ instances
        logits = self.head(bag[None]).squeeze(-1)
        if label is None:
            return DSMILOutput(logits, None)
        instance_loss = F.cross_entropy(torch.amax(instance_logits, dim=0)[None], label)
        return DSMILOutput(logits, 0.5 * instance_loss)
