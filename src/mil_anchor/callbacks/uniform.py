"""A warning for attention that has become uniform, which is stable and shows nothing."""

from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from mil_anchor.attention import normalized_entropy

# Entropy / ln N of an epoch from which attention counts as uniform.
UNIFORM = 0.97

# Any attention over one or two instances is nearly uniform.
_FEWEST_INSTANCES = 3
_FEWEST_EPOCHS = 3

# Whose users have been warned in this fit, by any of our callbacks.
_warned: WeakSet[Trainer] = WeakSet()


class UniformWatch:
    """Warns, once in a fit, when attention has become uniform.

    That is when its entropy / ln N, the mean over an epoch, lies above 0.97. Untrained attention is
    nearly uniform, too: so an earlier epoch of the fit must have been below, or half of the
    training be over, and two epochs must have passed. Bags of one or two instances do not count.

    Args:
        what: Which attention is watched, for the message: "training", "validation".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._was_below = False
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    def start(self, trainer: Trainer) -> None:
        """A fit begins."""
        self._was_below = False
        self._sums, self._counts = [], []
        _warned.discard(trainer)

    @torch.no_grad()
    def add(
        self, scores: Float[Tensor, "bag row instance"], mask: Bool[Tensor, "bag instance"] | None
    ) -> None:
        """Take in the raw scores of one training step; on a GPU nothing waits for them.

        Args:
            scores: Valid raw scores, -inf where the model masks.
            mask: True marks a real instance; None: all are real.
        """
        if scores.shape[-1] < _FEWEST_INSTANCES:
            return
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        log_attention = torch.log_softmax(scores.detach().float(), dim=-1)
        counted = (log_attention > -torch.inf).sum(dim=-1) >= _FEWEST_INSTANCES
        self._sums.append((normalized_entropy(log_attention) * counted).sum())
        self._counts.append(counted.sum())

    def end_epoch(self, trainer: Trainer, mean: float | None = None) -> None:
        """Judge the epoch, and warn if its attention has become uniform.

        Args:
            trainer: The Trainer whose fit it is.
            mean: The epoch's mean entropy / ln N over bags of more than two instances; None: that
                of the scores added. Of several processes, the first one judges its own bags.
        """
        if self._sums:
            n_rows = int(torch.stack(self._counts).sum())
            total = float(torch.stack(self._sums).double().sum())
            self._sums, self._counts = [], []
            if mean is None and n_rows:
                mean = total / n_rows
        if mean is None:
            return
        if mean <= UNIFORM:
            self._was_below = True
        elif (
            trainer.current_epoch + 1 >= _FEWEST_EPOCHS
            and (self._was_below or _is_half_over(trainer))
            and trainer not in _warned
        ):
            _warned.add(trainer)
            rank_zero_warn(
                f"The {self.what} attention has become uniform: its entropy / ln N was "
                f"{mean:.3f} in epoch {trainer.current_epoch}, above {UNIFORM}. Uniform attention "
                "is stable, but shows nothing. If a plug-in flattens it, use a smaller weight "
                "(plugin.weight), another target (NSF flattens, softmax does not), or a schedule "
                "that ramps the weight in later."
            )


def _is_half_over(trainer: Trainer) -> bool:
    """Whether an epoch that ends now is the middle of the training, or later; if that is known."""
    n_epochs, n_steps = trainer.max_epochs, trainer.max_steps
    by_epochs = n_epochs is not None and 0 < n_epochs <= 2 * (trainer.current_epoch + 1)
    return by_epochs or 0 < n_steps <= 2 * trainer.global_step
