"""AnchorCallback: holds a model's attention to an EMA of its own attention block."""

from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mil_anchor.anchor import Anchor, check_decay, has_lazy_parameters
from mil_anchor.attention import kl_divergence, log_normalized_sigmoid, log_softmax
from mil_anchor.callbacks.processes import is_distributed, tell
from mil_anchor.callbacks.regularizer import AttentionRegularizer
from mil_anchor.sites.base import RecordedAttention, Site

TARGETS = {"nsf": log_normalized_sigmoid, "softmax": log_softmax}


class AnchorCallback(AttentionRegularizer):
    """Adds ``weight x KL(target(anchor scores) ‖ softmax(online scores))`` to the training loss.

    The anchor is an EMA copy of the attention block and gets the block's own, detached input. It
    lives here, not in the model: the model's ``state_dict`` is untouched and at inference nothing
    of it remains. A checkpoint of the Trainer carries it.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        target: What the anchor's scores become: ``"nsf"`` (the paper's) or ``"softmax"``.
        decay: EMA factor in [0, 1).
        weight: Coefficient of the divergence (the paper's beta), at least 0.
        update: Move the anchor after every optimizer ``"step"`` or every ``"epoch"``.
        strict: Whether scores that no softmax of the model has got are an error or a warning.

    Raises:
        ValueError: An argument is out of range; the message names it.

    Logs ``anchor/kl`` (the divergence in nats) and ``anchor/loss`` (weight x kl), means over the
    epoch's distributions.

    Source: ASMIL (arXiv 2603.06658), eq. 4, 5, 7 and 9. KL is summed over instances and averaged
    over rows and bags.
    """

    def __init__(
        self,
        site: Site | str | None = None,
        *,
        target: str = "nsf",
        decay: float = 0.999,
        weight: float = 0.01,
        update: str = "step",
        strict: bool = True,
    ) -> None:
        super().__init__(site, weight=weight, strict=strict)
        _check_choice("target", target, tuple(TARGETS))
        _check_choice("update", update, ("step", "epoch"))
        check_decay(decay)
        self.target = target
        self.decay = decay
        self.update = update
        self._anchor: Anchor | None = None
        self._saved: dict[str, Tensor] | None = None
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Every fit has an anchor of its own: of this model, or of the checkpoint loaded next.
        if stage == "fit":
            self._anchor = None
        self._saved = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None and self._saved is None:
            tell(
                f"The checkpoint {trainer.ckpt_path} holds no anchor for {self.state_key}: the "
                "anchor starts from the loaded weights."
            )
        super().on_train_start(trainer, pl_module)

    @override
    def _attach(self, site: Site) -> None:
        super()._attach(site)
        # Only now are the weights final: loaded, and broadcast from rank 0.
        if not has_lazy_parameters(self.online.block):
            self._start_anchor()
        if self.update == "step":
            self._follow()

    @property
    def anchor(self) -> Anchor:
        """The EMA copy of the attention block; there is one from a fit's first step on."""
        if self._anchor is None:
            raise RuntimeError("The anchor starts with the first training step of a fit.")
        return self._anchor

    @override
    def penalty(self, attention: RecordedAttention) -> Float[Tensor, "bag row"]:
        if self._anchor is None:  # lazy parameters exist only now
            self._start_anchor()
        # The anchor runs in evaluation mode: what the model masks only in training, it does not.
        masked = attention.scores == -torch.inf
        anchor_scores = self.anchor.apply(self.online.site.rescore, attention.inputs)
        anchor_scores = anchor_scores.masked_fill(masked, -torch.inf)
        log_target = TARGETS[self.target](anchor_scores, attention.mask)
        log_online = log_softmax(attention.scores, attention.mask)
        return kl_divergence(log_target, log_online)

    @override
    def log_values(self, penalty: Tensor) -> dict[str, Tensor]:
        return {"anchor/kl": penalty, "anchor/loss": self.weight * penalty}

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.update == "epoch" and self._anchor is not None:
            self._anchor.update()
            _share_buffers(self._anchor)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._anchor is None else {"anchor": self._anchor.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Called before the model is on its device, and by validate and test too: only kept.
        self._saved = state_dict.get("anchor")

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The site is a part of the key, and may have been found then and be named now.
        own = f"{type(self).__name__}{{"
        states = checkpoint.get("callbacks", {})
        keys = [key for key in states if key.startswith(own)]
        alike = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if type(callback) is type(self)
        ]
        if self.state_key not in states and len(keys) == len(alike) == 1:
            self._saved = states[keys[0]].get("anchor")

    def _start_anchor(self) -> None:
        self._anchor = Anchor(self.online.block, decay=self.decay)
        if self._saved is not None:
            self._anchor.load_state_dict(self._saved)
            self._saved = None

    def _follow(self) -> None:
        """Move the anchor after each step of the optimizers that own the block's parameters."""
        block = {id(parameter) for parameter in self.online.block.parameters()}
        for optimizer in self.module.trainer.optimizers:
            owned = [p for g in optimizer.param_groups for p in g["params"] if id(p) in block]
            if owned:
                self._handles.append(optimizer.register_step_post_hook(self._on_step(owned)))
        if not self._handles:
            raise MisconfigurationException(
                f"An optimizer must own a parameter of attention block '{self.online.site.path}', "
                "or the anchor never moves, but none does. Name the block that is trained."
            )

    def _on_step(self, owned: list[Tensor]) -> Any:
        def move(optimizer: Any, *_: Any) -> None:
            # A fused optimizer is called in a step that it then skips, for the AMP scaler.
            if bool(getattr(optimizer, "found_inf", False)):
                return
            # A training step that returns None still calls optimizer.step, without gradients.
            if self._anchor is not None and any(p.grad is not None for p in owned):
                self._anchor.update(owned)
                _share_buffers(self._anchor)

        return move

    def _detach(self) -> None:
        super()._detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _share_buffers(anchor: Anchor) -> None:
    """Give all processes the same anchor: after a step parameters are equal, buffers are not."""
    if is_distributed():
        for buffer in anchor.block.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but got '{value}'.")
