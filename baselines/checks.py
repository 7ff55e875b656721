"""What every baseline demands of its arguments and of the bags that it is given."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def check_positive(**counts: int) -> None:
    """Demands that each named count is at least one.

    Raises:
        ValueError: A count is smaller than one.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, but got {count}. Give a positive count.")


def check_dropout(rate: float, *, name: str = "dropout") -> None:
    """Demands that a dropout probability leaves something over.

    Raises:
        ValueError: The probability lies outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1), but got {rate}. Use 0 to switch it off.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Demands one of the names that an argument knows.

    Raises:
        ValueError: The value is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but got {value!r}.")


def check_bags(
    model: str,
    in_features: int,
    features: Float[Tensor, "bag instance width"],
    mask: Bool[Tensor, "bag instance"] | None,
) -> Bool[Tensor, "bag instance"]:
    """Demands bags that the model can read, and completes the mask.

    Args:
        model: The model's name, for the message.
        in_features: The feature width that the model was built for.
        features: A padded batch of bags.
        mask: True marks a real instance; None: all are real.

    Returns:
        The mask, all True where none was given.

    Raises:
        ValueError: The features have another width, or a bag has no real instance.
    """
    width = features.shape[-1]
    if width != in_features:
        raise ValueError(
            f"{model} expects features of width {in_features}, but got {width}. "
            f"Build it with in_features={width}, or check which encoder made these features."
        )
    if mask is None:
        mask = features.new_ones(features.shape[:2], dtype=torch.bool)
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Every bag needs a real instance, but bags {empty} are all padding. "
            "Drop bags without instances before batching."
        )
    return mask
