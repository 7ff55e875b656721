"""Layouts: which axis of an attention block's output is the bag, the row and the instance."""

from itertools import product

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mil_anchor.sites.base import describe


def check_layout(layout: str) -> None:
    """Raise a ValueError unless the layout has an instance axis and no unknown or double one."""
    axes = layout.replace("(", " ").replace(")", " ").split()
    named = [axis for axis in axes if axis != "1"]
    if "n" not in named or len(set(named)) != len(named) or not set(named) <= set("bnr"):
        raise ValueError(
            "A layout must consist of b (bag), n (instance), r (row) and 1, each letter at "
            f"most once and n always, but got '{layout}'. Write for example 'b n r'."
        )


def arrange(
    scores: Tensor, layout: str, path: str, n_bags: int | None
) -> Float[Tensor, "bag row instance"]:
    """Scores of a layout as (bag, row, instance).

    Raises:
        ValueError: They do not fit the layout, or it fuses bags of unknown number.
    """
    axes = " ".join(axis if axis in layout else "1" for axis in "brn")
    if "(" in layout and n_bags is None:
        raise ValueError(
            f"The layout '{layout}' of block '{path}' needs the number of bags, but the "
            "batch does not tell it. Give the batch a mask, a label or a bag_id entry."
        )
    sizes = {"b": n_bags} if "(" in layout else {}
    try:
        return rearrange(scores, f"{layout} -> {axes}", **sizes)
    except RuntimeError as error:  # einops' own error type derives from it
        raise ValueError(
            f"The scores of block '{path}' must have the layout '{layout}', but its tap "
            f"returned {describe(scores)}. Give the layout that fits, such as 'b n r'."
        ) from error


def batched_features(
    features: Tensor | None, shape: tuple[int, int], path: str, *, instances_first: bool = False
) -> Float[Tensor, "bag instance width"]:
    """The features that scores belong to, with a bag axis and without a class token in front.

    Args:
        features: What a block got: (bag, instance, width), (instance, width) or the bags one after
            another; instances may have a class token in front.
        shape: Numbers of bags and of instances that the scores have.
        path: The block's name in messages.
        instances_first: Whether the first two axes are (instance, bag).

    Raises:
        ValueError: The features do not fit the scores.
    """
    n_bags, n_instances = shape
    if features is not None and features.ndim == 2 and len(features) == n_bags * n_instances:
        if instances_first:
            return features.reshape(n_instances, n_bags, -1).transpose(0, 1)
        return features.reshape(n_bags, n_instances, -1)
    if features is not None and features.ndim == 2 and n_bags == 1:
        features = features.unsqueeze(0)
    if features is not None and features.ndim == 3:
        batched = features.transpose(0, 1) if instances_first else features
        if len(batched) == n_bags and batched.shape[1] - n_instances in (0, 1):
            return batched[:, batched.shape[1] - n_instances :]
    raise ValueError(
        f"The first input of '{path}' must be the features of the instances that it scores, "
        f"{n_instances} in each of {n_bags} bags, but it is {describe(features)}. Name the block "
        "that gets (bag, instance, width)."
    )


def tell_layout(scores: Tensor, features: Tensor | None, path: str) -> str:
    """The layout of scores, told from the features that they judge.

    Raises:
        ValueError: None fits, or several do.
    """
    if features is None or features.ndim not in (2, 3):
        raise ValueError(
            f"The layout of the scores of block '{path}' can only be told when its first input is "
            f"(bag, instance, width) or (instance, width), but that is {describe(features)}. "
            "Give the site its layout, such as layout='b n r', with the axes that hold."
        )
    fitting = fitting_layouts(scores, features)
    # With one row, both readings of a one-instance bag are the same.
    one_row = scores.numel() == features.shape[:-1].numel()
    if len(fitting) == 1 or (fitting and one_row):
        return fitting[0]
    raise ValueError(
        f"The layout of the scores of block '{path}' cannot be told: it takes "
        f"{describe(features)} and returns {describe(scores)}. "
        "Give the site its layout, such as layout='b n r', with the axes that hold."
    )


def fitting_layouts(scores: Tensor, features: Tensor | None) -> list[str]:
    """The common layouts by which these scores can belong to these features."""
    if features is None or features.ndim not in (2, 3):
        return []
    batched = features.ndim == 3
    layouts = ("b n r", "b r n", "b n") if batched else ("n r", "r n", "n")
    # Convolutions have the instances in the last axis.
    for n_instances in (features.shape[-2], features.shape[-1]):
        fitting = [
            layout
            for layout in layouts
            if len(layout.split()) == scores.ndim
            and scores.shape[layout.split().index("n")] == n_instances
            and (not batched or scores.shape[0] == features.shape[0])
        ]
        if fitting:
            return fitting
    return []


def possible_layouts(shape: tuple[int, ...], *, n_bags: int, n_instances: int) -> list[str]:
    """All layouts that scores of this shape can have, the usual ones first.

    Scores that fuse bags and instances have both in the first axis. Where an axis could be a bag, a
    row or an instance, the order bag, instance, row is assumed.
    """
    fused = n_bags > 1 and shape[0] == n_bags * n_instances
    sizes = {"b": n_bags, "n": n_instances, "1": 1, "(b n)": n_bags * n_instances}
    layouts = []
    for axes in product(*[("(b n)",) if fused else "bnr1"], *["bnr1"] * (len(shape) - 1)):
        named = [letter for letter in "".join(axes) if letter in "bnr"]
        unique = len(set(named)) == len(named) and "n" in named
        has_bags = n_bags == 1 or "b" in named
        sized = zip(axes, shape, strict=True)
        in_order = (
            "r" not in axes
            or "n" not in axes
            or (axes.index("n") < axes.index("r") or shape[axes.index("r")] != n_instances)
        )
        if (
            unique
            and has_bags
            and in_order
            and all(sizes.get(axis, size) == size for axis, size in sized)
        ):
            layouts.append(" ".join(axes))
    # One bag may be no axis at all; it is rather that than an axis behind others.
    return sorted(layouts, key=lambda layout: "b" in layout[2:] and not fused)
