"""MILModule: trains and evaluates a bag classifier with Lightning."""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from mil_anchor.callbacks.processes import weighted_mean
from mil_anchor.data.bags import Batch
from mil_anchor.metrics import bag_metrics

_FUSED_DEVICES = ("cpu", "cuda")


class Prediction(NamedTuple):
    """One bag's class probabilities."""

    bag_id: str
    label: int
    probabilities: list[float]


class _Evaluated(NamedTuple):
    """A batch of an evaluation that runs."""

    bag_ids: list[str]
    labels: Tensor
    probabilities: Tensor


class MILModule(LightningModule):
    """Bag classification: cross-entropy plus the model's own auxiliary loss, Adam, cosine to zero.

    The model is called with ``features`` and with whichever of the keywords ``mask`` and ``label``
    (in training) its ``forward`` names. It returns an object with ``logits`` and, if it has them,
    ``auxiliary_loss`` and ``bag_loss_weight``, or plain logits: (bag, class), or (bag,) or
    (bag, 1) for a binary model of one logit, which trains by binary cross-entropy.

    Logs ``train/loss`` (without plug-ins), ``val/loss``, ``val/f1``, ``val/auroc``,
    ``val/accuracy``, ``val/balanced_accuracy``, ``val/score`` (AUROC + F1), ``val/selection`` (the
    score, lowered by less than 1e-4 for the loss, which chooses the checkpoint), and the same
    metrics under ``test/``.

    Args:
        model: The bag classifier.
        n_classes: Number of classes, 2 for a model of one logit.
        lr: Initial learning rate.
        weight_decay: Adam's L2 coefficient.

    Raises:
        ValueError: The learning rate or the weight decay is out of range.

    Source: protocol of ASMIL (arXiv 2603.06658), App. B.
    """

    def __init__(
        self, model: nn.Module, *, n_classes: int, lr: float = 1e-4, weight_decay: float = 1e-5
    ) -> None:
        super().__init__()
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be a finite number above 0, but got {lr}. Try 1e-4.")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(
                f"weight_decay must be a finite number of at least 0, but got {weight_decay}."
            )
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self._metrics: dict[str, MetricCollection] = nn.ModuleDict(  # type: ignore[assignment]
            {part: bag_metrics(n_classes, prefix=f"{part}/") for part in ("val", "test")}
        )
        self._losses: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        self._evaluated: list[_Evaluated] = []
        self._n_bags: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        accepted = inspect.signature(model.forward).parameters
        self._keywords = [name for name in ("mask", "label") if name in accepted]

    @property
    def predictions(self) -> list[Prediction]:
        """Those of the last evaluation, or of the one that runs, so far."""
        return [
            Prediction(*row)
            for batch in self._evaluated
            for row in zip(
                batch.bag_ids, batch.labels.tolist(), batch.probabilities.tolist(), strict=True
            )
        ]

    @override
    def forward(self, batch: Batch, *, with_label: bool = False) -> Any:
        """The model's output for a batch; the label only reaches the model in training."""
        keywords = {"mask": batch["mask"], "label": batch["label"] if with_label else None}
        return self.model(batch["features"], **{name: keywords[name] for name in self._keywords})

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self(batch, with_label=True)
        loss = _bag_loss(_logits(output), batch["label"])
        auxiliary = getattr(output, "auxiliary_loss", None)
        if auxiliary is not None:
            loss = getattr(output, "bag_loss_weight", 1.0) * loss + auxiliary
        self._keep_loss("train", loss, batch)
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self._mean_loss("train"))

    @override
    def on_validation_epoch_start(self) -> None:
        self._evaluated = []

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        values = self._log_metrics("val")
        score = values["val/auroc"] + values["val/f1"]
        # A few validation bags give many epochs the same score, often the best: then the loss
        # decides, and not which epoch came first.
        loss = values["val/loss"]
        self.log("val/score", score, prog_bar=True)
        self.log("val/selection", score - 1e-4 * loss / (1 + loss))

    @override
    def on_test_epoch_start(self) -> None:
        self._evaluated = []

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._adam()
        n_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _adam(self) -> torch.optim.Adam:
        """Adam as one operation for all weights where torch has it, which it has not everywhere."""
        fused = (
            all(parameter.is_floating_point() for parameter in self.parameters())
            and self.trainer.strategy.root_device.type in _FUSED_DEVICES
            # Lightning cannot clip gradients that a fused step itself frees of their AMP scale.
            and not self.trainer.gradient_clip_val
        )
        optimizer = torch.optim.Adam(
            self.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=fused
        )

        def keep_fused(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            # A checkpoint, perhaps of another device, says how its own step was made.
            groups = [group | {"fused": fused} for group in state["param_groups"]]
            return state | {"param_groups": groups}

        optimizer.register_load_state_dict_pre_hook(keep_fused)
        return optimizer

    def _evaluate(self, part: str, batch: Batch) -> None:
        logits = _logits(self(batch))
        self._keep_loss(part, _bag_loss(logits, batch["label"]), batch)
        self._evaluated.append(_Evaluated(batch["bag_id"], batch["label"], _probabilities(logits)))

    def _keep_loss(self, part: str, loss: Tensor, batch: Batch) -> None:
        self._losses[part].append(loss.detach())
        self._n_bags[part].append(len(batch["label"]))

    def _mean_loss(self, part: str) -> Tensor:
        mean = weighted_mean(self._losses[part], self._n_bags[part])
        self._losses[part], self._n_bags[part] = [], []
        return mean

    def _log_metrics(self, part: str) -> dict[str, Tensor]:
        # At once: an update of the metrics costs as much as a small bag, and a look at a number
        # makes a GPU wait.
        labels = torch.cat([batch.labels for batch in self._evaluated])
        probabilities = torch.cat([batch.probabilities for batch in self._evaluated])
        metrics = self._metrics[part]
        metrics.update(probabilities, labels)
        values = {**metrics.compute(), f"{part}/loss": self._mean_loss(part)}
        metrics.reset()
        self.log_dict(values)
        return values


def _logits(output: Any) -> Float[Tensor, "bag *cls"]:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "A model must return logits, or an object with .logits, but it returned a "
            f"{type(output).__name__}. Wrap it in a module that returns its bag logits."
        )
    return logits.squeeze(-1) if logits.ndim == 2 and logits.shape[1] == 1 else logits


def _bag_loss(logits: Float[Tensor, "bag *cls"], label: Tensor) -> Float[Tensor, ""]:
    if logits.ndim == 1:
        return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype))
    return F.cross_entropy(logits, label)


def _probabilities(logits: Float[Tensor, "bag *cls"]) -> Float[Tensor, "bag cls"]:
    if logits.ndim == 1:
        positive = torch.sigmoid(logits.float())
        return torch.stack([1 - positive, positive], dim=1)
    return torch.softmax(logits.float(), dim=1)
