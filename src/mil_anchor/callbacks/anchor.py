"""AnchorCallback: holds a model's attention to an EMA of its own attention block."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mil_anchor.anchor import STARTS, Anchor, check_decay, has_lazy_parameters
from mil_anchor.attention import log_softmax
from mil_anchor.callbacks.evaluated import EvaluatedWeights
from mil_anchor.callbacks.optimizers import has_moved, parameters_of
from mil_anchor.callbacks.processes import share, tell
from mil_anchor.callbacks.regularizer import AttentionRegularizer
from mil_anchor.matching import REDUCTIONS, attention_distance, bag_feature_distance
from mil_anchor.precision import PRECISIONS, check_bf16
from mil_anchor.schedules import Constant, Schedule
from mil_anchor.sites.base import RecordedAttention, Site
from mil_anchor.targets import Target, as_target

EVALUATES = ("online", "anchor")
MATCHES = ("attention", "bag_feature")
UPDATES = ("step", "epoch", "never")


class AnchorCallback(EvaluatedWeights, AttentionRegularizer):
    """Adds ``weight x KL(target(anchor scores) ‖ softmax(online scores))`` to the training loss.

    The anchor is an EMA copy of the attention block and gets the block's own, detached input. It
    lives here, not in the model: the model's ``state_dict`` is untouched and at inference nothing
    of it remains, unless it is what is evaluated. A checkpoint of the Trainer carries it.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        target: What the anchor's scores become: ``"nsf"`` (the paper's), ``"softmax"``,
            ``"nsf_centered"``, ``"entmax"``, ``"sparsemax"``, ``"uniform"``, or a `Target`. Where
            it does not read scores (uniform) there is no anchor at all.
        decay: EMA factor in [0, 1).
        warmup: Let the decay rise, ``min(decay, (1 + t) / (10 + t))`` at update t, so that the
            anchor follows early, fast-changing weights.
        weight: Coefficient of the divergence (the paper's beta), at least 0.
        schedule: What the weight is multiplied by as the training goes on: ``"constant"``,
            ``"ramp"``, ``"linear"``, ``"cosine"``, or a `Schedule`.
        update: Move the anchor after every optimizer ``"step"``, every ``"epoch"``, or ``"never"``.
        start: The anchor begins as a ``"copy"`` of the block, or as a ``"random"`` initialisation.
            A random one that never moves is the control for what the average is good for.
        match: Hold the online ``"attention"`` to the target, or only its ``"bag_feature"``: then
            the term is ``‖sum_i (target_i - attention_i) h_i‖^2 / width`` with the block's own
            input features h.
        reduction: The divergence is a ``"sum"`` over instances, as in the paper, or a ``"mean"``,
            as in its authors' released code: N times weaker, for reproducing that only.
        evaluate: Validate and test with the ``"online"`` attention block, as in the paper, or with
            the parameters of the ``"anchor"`` in its place; see `EvaluatedWeights`.
        anchor_precision: What the anchor's forward pass runs in: ``"float32"``, or ``"bf16"`` for
            about half its time, where the device computes in bfloat16 itself. EMA, target and
            divergence stay in float32. Scores of a gated scorer were off by 0.6 % of their spread
            (rms): at a spread of 0.09 / 0.9 / 9 a softmax target by 0.04 / 0.4 / 5-9 % in the mean,
            an NSF by 0.02 / 0.2 / 0.5-2 %, and the KL to either by at most 0.005 / 0.15 / 50 %
            (softmax) or 0.1 % (NSF) of itself.
        scope: ``"block"``: the anchor is a copy of the attention block alone; ``"encoder"``: of
            the whole model around it.
        strict: Whether scores that no softmax of the model has got are an error or a warning.

    Raises:
        ValueError: An argument is out of range, or two of them exclude each other.
        MisconfigurationException: When a fit starts: the device has no bfloat16.

    Logs ``anchor/kl`` (the divergence in nats; with the bag feature ``anchor/bag_feature``) and
    ``anchor/loss`` (weight x divergence), means over the epoch's distributions; at the epoch's end
    ``anchor/distance``, how far the anchor's parameters are from the block's, relative to these;
    and ``anchor/weight``, the epoch's mean coefficient, if it changes.

    Source: ASMIL (arXiv 2603.06658), eq. 4, 5, 7 and 9; the bag feature is its App. I. KL is summed
    over instances and averaged over rows and bags.
    """

    def __init__(
        self,
        site: Site | str | None = None,
        *,
        target: Target | str = "nsf",
        decay: float = 0.999,
        warmup: bool = False,
        weight: float = 0.03,
        schedule: Schedule | str = "constant",
        update: str = "step",
        start: str = "copy",
        match: str = "attention",
        reduction: str = "sum",
        evaluate: str = "online",
        anchor_precision: str = "float32",
        scope: str = "block",
        strict: bool = True,
    ) -> None:
        super().__init__(site, weight=weight, schedule=schedule, scope=scope, strict=strict)
        check_decay(decay)
        _check_choice("update", update, UPDATES)
        _check_choice("start", start, STARTS)
        _check_choice("match", match, MATCHES)
        _check_choice("reduction", reduction, REDUCTIONS)
        _check_choice("evaluate", evaluate, EVALUATES)
        _check_choice("anchor_precision", anchor_precision, PRECISIONS)
        if match == "bag_feature" and reduction == "mean":
            raise ValueError(
                "reduction='mean' divides a divergence of attention by its instances, but a bag "
                "feature (match='bag_feature') has none. Leave reduction away."
            )
        self.target = as_target(target)
        # An update after the epoch comes between its validation and its checkpoint.
        if evaluate == "anchor" and (update != "step" or not self.target.reads_scores):
            raise ValueError(
                "evaluate='anchor' must have an anchor that follows the block step by step, but "
                f"there is none with target {self.target} and update='{update}'. Use "
                "evaluate='online'."
            )
        self.decay = decay
        self.warmup = warmup
        self.update = update
        self.start = start
        self.match = match
        self.reduction = reduction
        self.evaluate = evaluate
        self.anchor_precision = anchor_precision
        self._anchor: Anchor | None = None
        self._saved: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Every fit has an anchor of its own: of this model, or of the checkpoint loaded next.
        if stage == "fit":
            self._anchor = None
        self._saved = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None and self.target.reads_scores and not self._saved:
            begins = "from the loaded weights" if self.start == "copy" else "at random"
            tell(
                f"The checkpoint {trainer.ckpt_path} holds no anchor for {self.state_key}: the "
                f"anchor starts {begins}."
            )
        if self.anchor_precision == "bf16":
            try:
                check_bf16(pl_module.device)
            except RuntimeError as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        super().on_train_start(trainer, pl_module)

    @override
    def _attach(self, site: Site) -> None:
        super()._attach(site)
        if not self.target.reads_scores:
            return
        # Only now are the weights final: loaded, and broadcast from rank 0.
        if not has_lazy_parameters(self.online.block):
            self._start_anchor()
        if self.update == "step":
            self._follow()

    @property
    def anchor(self) -> Anchor:
        """The EMA copy of the attention block; there is one from a fit's first step on."""
        if self._anchor is None:
            raise RuntimeError(
                "The anchor starts with the first training step of a fit, if the target reads "
                f"scores. This target is {self.target}."
            )
        return self._anchor

    def distance(self) -> Float[Tensor, ""]:
        """How far the anchor's parameters are from the online block's, relative to these."""
        return self.anchor.distance()

    @override
    def penalty(self, attention: RecordedAttention) -> Float[Tensor, "bag row"]:
        reads = self.target.reads_scores
        scores = self._anchor_scores(attention) if reads else attention.scores
        # Not every target follows the training: one that does refuses NaN.
        progress = math.nan if _is_endless(self.module.trainer) else self.progress
        log_target = self.target(scores, attention.mask, progress=progress)
        log_online = log_softmax(attention.scores, attention.mask)
        if self.match == "attention":
            return attention_distance(log_target, log_online, reduction=self.reduction)
        features = self.online.site.instances(attention.inputs)
        return bag_feature_distance(log_target, log_online, features)

    @override
    def log_values(self, penalty: Tensor) -> dict[str, Tensor]:
        measured = "anchor/kl" if self.match == "attention" else "anchor/bag_feature"
        values = {measured: penalty, "anchor/loss": self.mean_weight * penalty}
        if not isinstance(self.schedule, Constant):
            values["anchor/weight"] = penalty.new_tensor(self.mean_weight)
        if self._anchor is not None:
            values["anchor/distance"] = self.distance()
        return values

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.update == "epoch" and self._anchor is not None:
            self._anchor.update()
            share(self._anchor.block.buffers())

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._anchor is None:
            return {}
        return {"anchor": self._anchor.state_dict(), "n_updates": self._anchor.n_updates}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Called before the model is on its device, and by validate and test too: only kept.
        self._saved = state_dict

    @override
    def replacements(self, pl_module: LightningModule) -> Sequence[tuple[Tensor, Tensor]]:
        if self._anchor is None:
            return []
        pairs = zip(self._anchor.online.parameters(), self._anchor.block.parameters(), strict=True)
        return list(pairs)

    def _start_anchor(self) -> None:
        start = "copy" if self._saved else self.start
        block = self.online.block
        self._anchor = Anchor(
            block,
            decay=self.decay,
            warmup=self.warmup,
            start=start,
            precision=self.anchor_precision,
        )
        if self._saved:
            self._anchor.load_state_dict(self._saved["anchor"])
            # Checkpoints from before the warm-up do not count updates.
            self._anchor.n_updates = self._saved.get("n_updates", 0)
            self._saved = {}
        elif start == "random":
            # Each process has drawn its own.
            share(chain(self._anchor.block.parameters(), self._anchor.block.buffers()))

    def _anchor_scores(self, attention: RecordedAttention) -> Float[Tensor, "bag row instance"]:
        if self._anchor is None:  # lazy parameters exist only now
            self._start_anchor()
        # The anchor runs in evaluation mode: what the model masks only in training, it does not.
        masked = attention.scores == -torch.inf
        scores = self.anchor.apply(self.online.site.rescore, attention.inputs)
        return scores.masked_fill(masked, -torch.inf)

    def _follow(self) -> None:
        """Move the anchor after each step of the optimizers that own the block's parameters."""
        block = {id(parameter) for parameter in self.online.block.parameters()}
        for optimizer in self.module.trainer.optimizers:
            owned = [p for p in parameters_of(optimizer) if id(p) in block]
            if owned:
                self._handles.append(optimizer.register_step_post_hook(self._on_step(owned)))
        if not self._handles:
            raise MisconfigurationException(
                f"An optimizer must own a parameter of attention block '{self.online.site.path}', "
                "or the anchor never moves, but none does. Name the block that is trained."
            )

    def _on_step(self, owned: list[Tensor]) -> Any:
        def move(optimizer: Any, *_: Any) -> None:
            if self._anchor is not None and has_moved(optimizer, owned):
                self._anchor.update(owned)
                share(self._anchor.block.buffers())

        return move

    def _detach(self) -> None:
        super()._detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _is_endless(trainer: Trainer) -> bool:
    """Whether only a clock or an exception ends the fit."""
    return trainer.max_epochs == -1 and trainer.max_steps == -1


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but got '{value}'.")
