"""Proof that a site reads what the model's softmax gets."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mil_anchor.sites.base import RecordedAttention, Site
from mil_anchor.sites.normalizations import Normalization

# Models mask with -inf, the lowest finite number or -1e9; no score that is meant comes near.
MASKED = -1e8


def is_provable(attention: Sequence[RecordedAttention]) -> bool:
    """Whether some row has two scores that differ by more than rounding."""
    return not has_nan(attention) and any(
        varies(read.scores.detach().masked_fill(~_real(read).unsqueeze(1), -torch.inf))
        for read in attention
    )


def has_nan(attention: Sequence[RecordedAttention]) -> bool:
    """Whether a score is NaN: for the numerics to refuse, with the bag's name."""
    return any(bool(read.scores.isnan().any()) for read in attention)


def varies(scores: Tensor) -> bool:
    """Whether some row has two unmasked entries that differ by more than rounding."""
    real = scores > MASKED
    highest = scores.amax(dim=-1)
    lowest = scores.masked_fill(~real, torch.inf).amin(dim=-1)
    largest = scores.masked_fill(~real, 0).abs().amax(dim=-1)
    spread = (highest - lowest).masked_fill(~real.any(dim=-1), 0)
    return bool((spread > 64 * torch.finfo(scores.dtype).eps * largest).any())


def find_difference(
    site: Site, attention: Sequence[RecordedAttention], seen: Sequence[Normalization]
) -> str | None:
    """What differs between the scores that a site reads and the model's own normalisations.

    Args:
        site: The site.
        attention: What it read of one training step.
        seen: What the model normalised in that step.

    Returns:
        None when the softmax of every row is one that the model ran, else what is wrong and what
        to do, as a part of a sentence.
    """
    for read in attention:
        real = _real(read)
        n_keys = read.scores.shape[-1] + site.n_class_tokens
        candidates = [
            (other, _rows(other.scores)[:, site.n_class_tokens :])
            for other in seen
            if other.scores.shape[-1] == n_keys
        ]
        plain = [rows for other, rows in candidates if other.is_plain]
        # A bag without a real instance is for the numerics to refuse.
        for scores, own in zip(read.scores.detach(), real, strict=True):
            for row in scores if bool(own.any()) else ():
                if not any(bool(_same(row, own, rows).any()) for rows in plain):
                    return _difference(row, own, candidates)
    return None


def _real(read: RecordedAttention) -> Bool[Tensor, "bag instance"]:
    """Instances that count: those of the mask that no row of the model masks."""
    unmasked = (read.scores.detach() > MASKED).any(dim=1)
    return unmasked if read.mask is None else unmasked & read.mask.to(unmasked.device)


def _rows(values: Tensor) -> Float[Tensor, "row instance"]:
    return values.reshape(-1, values.shape[-1])


def _same(
    row: Float[Tensor, " instance"],
    real: Bool[Tensor, " instance"],
    others: Float[Tensor, "row instance"],
) -> Bool[Tensor, " row"]:
    """Which rows have the same softmax: the same instances, and scores equal but for a constant."""
    kept = real & (row > MASKED)
    same = ((others > MASKED) == kept).all(dim=-1)
    # Few of many rows get past the highest and the lowest score.
    high, low = (
        row.masked_fill(~kept, -torch.inf).argmax(),
        row.masked_fill(~kept, torch.inf).argmin(),
    )
    span = (row[high] - row[low]).double()
    near = (others[:, high].double() - others[:, low].double() - span).abs()
    same &= near <= 0.1 * span.abs() + 1e-2 * row[kept].abs().amax().double() + 1e-6
    if bool(same.any()):
        difference, allowed = _deviation(row, kept, others[same])
        same[same.clone()] = difference <= allowed
    return same


def _deviation(row: Tensor, real: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Largest difference of centred scores from each other row, and what rounding explains."""
    mine, theirs = row[real].double(), others[:, real].double()
    eps = max(torch.finfo(row.dtype).eps, torch.finfo(others.dtype).eps)
    size = torch.maximum(mine.abs().amax(), theirs.abs().amax(dim=-1))
    mine, theirs = mine - mine.mean(), theirs - theirs.mean(dim=-1, keepdim=True)
    # A missing temperature changes scores in proportion, rounding by a part of their size.
    allowed = 1e-4 * mine.abs().amax() + 8 * eps * size
    difference = (theirs - mine).abs().amax(dim=-1)
    # Masked entries among the compared ones.
    return difference.masked_fill(difference.isnan(), torch.inf), allowed


_Candidates = Sequence[tuple[Normalization, Tensor]]


def _difference(row: Tensor, real: Tensor, candidates: _Candidates) -> str:
    """What is wrong with a row that none of the model's softmaxes has got."""
    if not candidates:
        return (
            f"it ran no softmax over {len(row)} instances: it weights the instances in another "
            "way, or the block is not its attention"
        )
    # The surest sign first.
    explanations = (
        explain(row, real, candidates)
        for explain in (
            _is_output,
            _is_not_plain,
            _is_inverted,
            _is_masked_later,
            _covers_padding,
            _is_scaled,
        )
    )
    return next(
        (explanation for explanation in explanations if explanation is not None),
        f"none of the {len(candidates)} normalisations over {len(row)} instances that the model "
        "ran has these scores. Name the submodule whose output goes into the softmax",
    )


def _is_output(row: Tensor, real: Tensor, candidates: _Candidates) -> str | None:
    for other, rows in candidates:
        weights = _rows(other.attention)[:, -rows.shape[-1] :]
        if bool((weights - row)[:, real].abs().amax(dim=-1).le(1e-6).any()):
            return (
                "they are probabilities, which the model's softmax has put out. Name the submodule "
                "whose output goes into that softmax, for example with tap="
            )
    return None


def _is_not_plain(row: Tensor, real: Tensor, candidates: _Candidates) -> str | None:
    for other, rows in candidates:
        if other.function == "sigmoid":
            sigmoids = torch.sigmoid(row[real].double())
            difference = rows.double().exp()[:, real] - sigmoids / sigmoids.sum()
            if bool(difference.abs().amax(dim=-1).lt(1e-6).any()):
                return "the model normalises their sigmoids and not their exponentials"
        elif not other.is_plain and bool(_same(row, real, rows).any()):
            total = float(other.attention.sum(dim=-1).flatten()[0])
            return (
                f"the model does not apply a plain softmax to them: its weights sum to {total:.4g}"
            )
    return None


def _is_inverted(row: Tensor, real: Tensor, candidates: _Candidates) -> str | None:
    for _, rows in candidates:
        if bool(real.all()) or not bool(_same(row, ~real, rows).any()):
            continue
        return (
            f"the model's softmax covers just the {int((~real).sum())} instances that the mask "
            "calls padding: True must mean a real instance. Invert the batch's 'mask', or write "
            "AttentionSite(mask='~...')"
        )
    return None


def _is_masked_later(row: Tensor, real: Tensor, candidates: _Candidates) -> str | None:
    for _, rows in candidates:
        for other in rows:
            hidden = (other <= MASKED) & real
            if not hidden.any() or not (real & ~hidden).any():
                continue
            if bool(_same(row.masked_fill(hidden, -torch.inf), real, other[None]).any()):
                return (
                    f"the model masks {int(hidden.sum())} of {int(real.sum())} of them afterwards. "
                    "If these are padding, give the batch a 'mask' entry (True = real), or name "
                    "the block's own with AttentionSite(mask=...)"
                )
    return None


def _covers_padding(row: Tensor, real: Tensor, candidates: _Candidates) -> str | None:
    for _, rows in candidates:
        more = (rows > MASKED) & ~real
        difference, allowed = _deviation(row, real, rows)
        matching = more[more.any(dim=-1) & (difference <= allowed)]
        if len(matching):
            return (
                f"the model's softmax also covers {int(matching[0].sum())} instances that the "
                "batch's mask calls padding: the model ignores the mask. Use batch_size=1, or give "
                "the model the mask"
            )
    return None


def _is_scaled(row: Tensor, real: Tensor, candidates: _Candidates) -> str | None:
    """The factor that makes the scores one of the rows, up to a constant."""
    own = row[real].double()
    own = own - own.mean()
    for _, rows in candidates:
        for other in rows[(rows[:, real] > MASKED).all(dim=-1)]:
            theirs = other[real].double()
            theirs = theirs - theirs.mean()
            scale = float(own @ theirs / (own @ own).clamp_min(1e-300))
            error = (scale * own - theirs).abs().amax()
            if scale > 0 and bool(error <= 1e-4 * theirs.abs().amax()):
                return (
                    f"the model multiplies them by {scale:.6g} before its softmax. If that is a "
                    f"constant, write AttentionSite(scale={scale:.6g})"
                )
    return None
