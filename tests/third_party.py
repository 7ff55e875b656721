"""Models as a user may bring them: no mask, no label, plain logits, unknown to the registry."""

import torch
from torch import nn


class MeanModel(nn.Module):
    def __init__(self, in_features, n_classes) -> None:
        super().__init__()
        self.scorer = nn.Linear(in_features, 1)
        self.head = nn.Linear(in_features, n_classes)

    def forward(self, features):
        attention = torch.softmax(self.scorer(features), dim=1)
        return self.head((attention * features).sum(dim=1))


class NoAttention(nn.Module):
    def __init__(self, in_features, n_classes) -> None:
        super().__init__()
        self.head = nn.Linear(in_features, n_classes)

    def forward(self, features):
        return self.head(features.mean(dim=1))


class SigmoidModel(nn.Module):
    """Its attention is no softmax, and can only be named."""

    def __init__(self, in_features, n_classes) -> None:
        super().__init__()
        self.scorer = nn.Linear(in_features, 1)
        self.head = nn.Linear(in_features, n_classes)

    def forward(self, features):
        weights = torch.sigmoid(self.scorer(features))
        return self.head((weights * features).sum(dim=1) / weights.sum(dim=1))
