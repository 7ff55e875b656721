"""What the tests need to know of a model that somebody else may have written."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Case(NamedTuple):
    """A third-party model, or a small one of ours with the same trap.

    Args:
        name: Unique, as in "clam_sb".
        build: Makes the model, small and without dropout.
        loss: One training forward on a batch ("features" (bag, instance, width), "mask" (bag,
            instance) True = real, "label" (bag,)): the loss of its own training recipe.
        scores: The raw attention scores of one forward, (bag, row, instance) of each distribution,
            from the formulas and the model's weights; of padded instances they may be anything.
        site: Where its attention is: source text of the site that a user would write.
        found: The path of the block that discovery must find by itself; None: it must give up.
        plain: False: the model does not apply a plain softmax to its scores, so proof refuses it.
        proven: False: the model runs no softmax over instances that could prove the scores.
        n_bags: Bags in a batch.
        n_instances: Instances of the longest bag.
        width: Width of the features.
        padded: Whether the model can take a batch with padding.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    scores: Callable[[nn.Module, dict[str, Any]], list[Tensor]]
    site: str
    found: str | None
    plain: bool = True
    proven: bool = True
    n_bags: int = 1
    n_instances: int = 13
    width: int = 12
    padded: bool = False


def make_batch(case: Case, seed: int) -> dict[str, Any]:
    """A batch for this model; if it can take padding, all bags but the first are shorter."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.n_bags, case.n_instances)
    mask = torch.ones(shape, dtype=torch.bool)
    for bag in range(1, case.n_bags if case.padded else 1):
        mask[bag, case.n_instances - 2 * bag :] = False
    features = torch.randn(*shape, case.width, generator=generator) * mask[..., None]
    label = torch.randint(0, 2, (case.n_bags,), generator=generator)
    return {"features": features, "mask": mask, "label": label}
