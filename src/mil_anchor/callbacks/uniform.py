"""A warning for attention that has become uniform, which is stable and shows nothing."""

from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

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
        self._entropies: list[Tensor] = []
        self._n_instances: list[Tensor] = []

    def start(self, trainer: Trainer) -> None:
        """A fit begins."""
        self._was_below = False
        self._entropies, self._n_instances = [], []
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
        # As few kernels as it takes, in every step; the rest waits for the epoch's end.
        scores = scores.detach().float()
        entropy = torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1)
        self._entropies.append(entropy.flatten())
        self._n_instances.append((scores > -torch.inf).sum(dim=-1).flatten())

    def end_epoch(self, trainer: Trainer, mean: float | None = None) -> None:
        """Judge the epoch, and warn if its attention has become uniform.

        Args:
            trainer: The Trainer whose fit it is.
            mean: The epoch's mean entropy / ln N over bags of more than two instances; None: that
                of the scores added. Of several processes, the first one judges its own bags.
        """
        if self._entropies:
            entropies, n_instances = torch.cat(self._entropies), torch.cat(self._n_instances)
            self._entropies, self._n_instances = [], []
            is_counted = n_instances >= _FEWEST_INSTANCES
            if mean is None and bool(is_counted.any()):
                normalized = entropies[is_counted].double() / n_instances[is_counted].log()
                mean = float(normalized.mean())
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
