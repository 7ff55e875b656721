"""AttentionMonitor: how much a model's attention on the validation bags moves between epochs."""

import csv
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mil_anchor.attention import js_divergence, normalized_entropy
from mil_anchor.callbacks.evaluation import EvaluationCallback
from mil_anchor.callbacks.processes import gather_objects
from mil_anchor.sites.base import Site


class AttentionRow(NamedTuple):
    """One row of ``attention.csv``."""

    epoch: int
    bag_id: str
    jsd: float | None
    entropy: float


class AttentionMonitor(EvaluationCallback):
    """Measures the attention of every validation bag in every epoch, without a forward of its own.

    Per bag, mean over rows: the Jensen-Shannon divergence to its attention in the validation before
    (nats, empty in the first one) and the entropy / ln N. Written to a CSV file with the columns
    ``epoch, bag_id, jsd, entropy``; means are logged as ``attention/jsd``, ``attention/entropy``.
    Bags come in a fixed order, from a model in evaluation mode. Works with and without a plug-in.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        path: The CSV file; None: ``attention.csv`` in the Trainer's log folder.
        strict: Whether attention that is not found, or scores that no softmax of the model has got,
            are an error or a warning. Attention that is not found gives no rows.

    Source: ASMIL (arXiv 2603.06658), eq. 3 and 35.
    """

    def __init__(
        self,
        site: Site | str | None = None,
        *,
        path: str | Path | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(site, strict=strict)
        self.path = path
        self._previous: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}
        self._file = Path()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # log_dir is a collective call: every rank asks.
        folder = trainer.log_dir or trainer.default_root_dir
        self._file = Path(self.path) if self.path is not None else Path(folder) / "attention.csv"
        if trainer.current_epoch == 0:
            self._previous = {}
        self._current = {}
        if trainer.is_global_zero:
            self._start_file(trainer.current_epoch)

    @override
    def receive(
        self, trainer: Trainer, batch: Any, of_bags: dict[str, Float[Tensor, "row instance"]]
    ) -> None:
        self._current.update(of_bags)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None:
            return
        epoch = trainer.current_epoch
        own = {
            bag_id: AttentionRow(
                epoch,
                bag_id,
                _jsd(self._previous.get(bag_id), log_attention),
                float(normalized_entropy(log_attention).mean()),
            )
            for bag_id, log_attention in self._current.items()
        }
        # By id, so each bag once: a distributed sampler may repeat bags.
        rows = [*_united(gather_objects(own)).values()]
        self._previous, self._current = self._current, {}
        if trainer.is_global_zero:
            with self._file.open("a", newline="") as file:
                csv.writer(file).writerows(rows)
        moved = [row.jsd for row in rows if row.jsd is not None]
        if moved:
            pl_module.log("attention/jsd", fmean(moved))
        if rows:
            pl_module.log("attention/entropy", fmean(row.entropy for row in rows))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"previous": _united(gather_objects(self._previous))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._previous = state_dict["previous"]

    @override
    def _give_up(self, why: str) -> None:
        super()._give_up(why)
        self._current = {}

    def _start_file(self, epoch: int) -> None:
        """A new file, or the rows of the epochs before the one that this fit begins with."""
        kept: list[AttentionRow] = []
        if epoch > 0 and self._file.exists():
            kept = [row for row in read_attention(self._file) if row.epoch < epoch]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(AttentionRow._fields)
            writer.writerows(kept)


def read_attention(path: Path) -> list[AttentionRow]:
    """The rows of an ``attention.csv``."""
    with path.open(newline="") as file:
        return [
            AttentionRow(
                int(row["epoch"]),
                row["bag_id"],
                float(row["jsd"]) if row["jsd"] else None,
                float(row["entropy"]),
            )
            for row in csv.DictReader(file)
        ]


def _jsd(previous: Tensor | None, current: Tensor) -> float | None:
    # A bag that was resampled to another size has no earlier attention to compare with.
    if previous is None or previous.shape != current.shape:
        return None
    return float(js_divergence(previous, current).mean())


def _united(of_processes: list[dict[str, Any]]) -> dict[str, Any]:
    return {bag_id: value for own in of_processes for bag_id, value in own.items()}
