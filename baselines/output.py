"""What every baseline returns."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class MILOutput(NamedTuple):
    """The result of one forward pass over a batch of bags.

    Args:
        logits: Class logits.
        scores: Raw attention scores, before any normalisation. Padded instances hold ``-inf``.
        auxiliary_loss: A further term of the training loss with its coefficient already applied
            (CLAM's instance loss, DSMIL's instance stream), or None: the model has no such term,
            or no label was given.
        bag_loss_weight: The coefficient of the bag loss beside that term (0.7 for CLAM).
    """

    logits: Float[Tensor, "bag cls"]
    scores: Float[Tensor, "bag row instance"]
    auxiliary_loss: Float[Tensor, ""] | None = None
    bag_loss_weight: float = 1.0
