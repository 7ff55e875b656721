"""AttentionMonitor: how much a model's attention on the validation bags moves between epochs."""

import csv
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mil_anchor.attention import log_softmax, normalized_entropy, top_mass
from mil_anchor.callbacks.evaluated import evaluated_weights
from mil_anchor.callbacks.evaluation import EvaluationCallback
from mil_anchor.callbacks.measures import (
    correlation,
    divergence,
    labelled_auroc,
    labels_of_bags,
    mixing_of_bags,
    restore_attention,
    round_attention,
)
from mil_anchor.callbacks.processes import gather_objects
from mil_anchor.callbacks.recorder import CallRecorder
from mil_anchor.callbacks.uniform import UniformWatch
from mil_anchor.sites.base import Site, find_submodule


class AttentionRow(NamedTuple):
    """One row of ``attention.csv``: a bag's attention in one epoch, None where not defined.

    Args:
        epoch: From 0.
        bag_id: Which bag.
        weights: Which weights were evaluated: ``online``, ``slow`` or ``anchor``.
        jsd: Jensen-Shannon divergence to the validation before, in nats.
        rank_correlation: Spearman's, with the validation before.
        entropy: Entropy / ln N.
        top1pct: Mass of the highest 1 % of the instances.
        top10: Mass of the 10 highest instances.
        auroc: Of the attention against the instances' labels, above 0 being positive.
        mixing_correlation: Spearman's, of a surrogate attention (of TransMIL) with the weights that
            the model really mixes its instances by.
    """

    epoch: int
    bag_id: str
    weights: str
    jsd: float | None
    rank_correlation: float | None
    entropy: float
    top1pct: float
    top10: float
    auroc: float | None
    mixing_correlation: float | None = None


MEASURES = AttentionRow._fields[3:]


class AttentionMonitor(EvaluationCallback):
    """Measures the attention of every validation bag in every epoch, without a forward of its own.

    What is measured, mean over rows, stands in `AttentionRow`, whose fields are the columns of the
    CSV file. Means over bags are logged as ``attention/jsd``, ``attention/entropy`` and so on. Bags
    come in a fixed order, from a model in evaluation mode. Works with and without a plug-in.

    From one validation to the next the attention is kept in float16 on the CPU, as is that of the
    validation that runs: 4 bytes for each instance and row, and half of it in a checkpoint. A
    resumed fit writes the file of an uninterrupted one. The rounding alone is a divergence of
    2e-8 nats (2e-7 at worst, where a single instance has half of the attention), and less the more
    uniform the attention is: 5e-13 at an entropy of .9999.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        path: The CSV file; None: ``attention.csv`` in the Trainer's log folder.
        max_bags: Watch only so many bags, for memory: the first of the first validation, and the
            same ones ever after. With several processes they are taken in turn from each, which
            with Lightning's own sampler and batches of one is the order of a single process. None:
            all bags.
        strict: Whether attention that is not found, or scores that no softmax of the model has got,
            are an error or a warning. Attention that is not found gives no rows.

    Raises:
        ValueError: max_bags is below 1.

    Source: ASMIL (arXiv 2603.06658), eq. 3 and 35, for the divergence.
    """

    def __init__(
        self,
        site: Site | str | None = None,
        *,
        path: str | Path | None = None,
        max_bags: int | None = None,
        strict: bool = True,
    ) -> None:
        if max_bags is not None and max_bags < 1:
            raise ValueError(
                f"max_bags must be at least 1, or None for all bags, but got {max_bags}."
            )
        super().__init__(site, strict=strict)
        self.path = path
        self.max_bags = max_bags
        self._watched: list[str] | None = None
        self._previous: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}
        self._rows: dict[str, AttentionRow] = {}
        self._mixing: CallRecorder | None = None
        self._uniform = UniformWatch("validation")
        self._file = Path()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # log_dir is a collective call: every rank asks.
        folder = trainer.log_dir or trainer.default_root_dir
        self._file = Path(self.path) if self.path is not None else Path(folder) / "attention.csv"
        if trainer.current_epoch == 0:
            self._previous, self._watched = {}, None
        self._forget_epoch()
        self._uniform.start(trainer)
        if trainer.is_global_zero:
            self._start_file(trainer.current_epoch)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if self._mixing is not None:
            self._mixing.start()

    @override
    def receive(
        self, trainer: Trainer, batch: Any, of_bags: dict[str, Float[Tensor, "row instance"]]
    ) -> None:
        weights = evaluated_weights(trainer)
        labels = labels_of_bags(batch, len(of_bags))
        mixings = self._take_mixing(of_bags)
        for (bag_id, recorded), label, mixing in zip(of_bags.items(), labels, mixings, strict=True):
            if not self._watches(bag_id):
                continue
            # In float64, for float32 alone is a divergence of 5e-7 on 20,000 instances.
            current = log_softmax(recorded.double())
            previous = restore_attention(self._previous.get(bag_id), current.shape)
            self._rows[bag_id] = AttentionRow(
                trainer.current_epoch,
                bag_id,
                weights,
                divergence(previous, current),
                correlation(previous, current),
                float(normalized_entropy(current).mean()),
                float(top_mass(current, share=0.01).mean()),
                float(top_mass(current, count=10).mean()),
                labelled_auroc(current, label),
                correlation(mixing, current),
            )
            self._current[bag_id] = round_attention(current)
            self._uniform.add(current[None], None)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None:
            return
        of_processes = gather_objects(self._rows)
        if self.max_bags is not None and self._watched is None and any(of_processes):
            self._watched = _first(of_processes, self.max_bags)
        # By id, so each bag once: a distributed sampler may repeat bags.
        rows = [row for bag_id, row in _united(of_processes).items() if self._watches(bag_id)]
        self._previous = {
            bag_id: kept for bag_id, kept in self._current.items() if self._watches(bag_id)
        }
        self._forget_epoch()
        if trainer.is_global_zero:
            with self._file.open("a", newline="") as file:
                csv.writer(file).writerows(rows)
        for measure in MEASURES:
            values = [value for row in rows if (value := getattr(row, measure)) is not None]
            if values:
                pl_module.log(f"attention/{measure}", fmean(values))
        self._uniform.end_epoch(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"previous": _united(gather_objects(self._previous)), "watched": self._watched}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._previous = state_dict["previous"]
        watched = state_dict["watched"]
        self._watched = None if watched is None else watched[: self.max_bags]

    @override
    def _attach(self, site: Site) -> None:
        super()._attach(site)
        if self._mixing_path:
            watched = {self._mixing_path: find_submodule(self.module, self._mixing_path)}
            self._mixing = CallRecorder(watched, only_with_grad=False)

    @override
    def _detach(self) -> None:
        super()._detach()
        if self._mixing is not None:
            self._mixing.remove()
            self._mixing = None

    @override
    def _give_up(self, why: str) -> None:
        super()._give_up(why)
        self._forget_epoch()

    @property
    def _mixing_path(self) -> str:
        return getattr(self.online.site, "mixing", "")

    def _forget_epoch(self) -> None:
        self._current, self._rows = {}, {}

    def _watches(self, bag_id: str) -> bool:
        if self.max_bags is None:
            return True
        if self._watched is None:  # in the first validation, so as not to keep more than that
            return bag_id in self._rows or len(self._rows) < self.max_bags
        return bag_id in self._watched

    def _take_mixing(
        self, of_bags: Mapping[str, Float[Tensor, "_ _"]]
    ) -> Sequence[Float[Tensor, "_ _"] | None]:
        """By which weights the model mixes each bag's instances, if not by its attention."""
        if self._mixing is None:
            return [None] * len(of_bags)
        calls = self._mixing.calls
        self._mixing.stop()
        return mixing_of_bags(self._mixing_path, calls, of_bags)

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
    """The rows of an ``attention.csv``.

    Raises:
        ValueError: A column is missing.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [name for name in AttentionRow._fields if name not in columns]
        if missing:
            raise ValueError(
                f"{path} must have the columns of attention.csv, but {missing} are missing. It was "
                "written by an older version or another program: run the training again."
            )
        return [_parse(row) for row in reader]


def _parse(row: Mapping[str, str]) -> AttentionRow:
    numbers = {name: float(row[name]) for name in MEASURES if row[name]}
    return AttentionRow(
        int(row["epoch"]),
        row["bag_id"],
        row["weights"],
        numbers.get("jsd"),
        numbers.get("rank_correlation"),
        numbers["entropy"],
        numbers["top1pct"],
        numbers["top10"],
        numbers.get("auroc"),
        numbers.get("mixing_correlation"),
    )


def _first(of_processes: Sequence[Mapping[str, Any]], n_bags: int) -> list[str]:
    """Ids of the first bags, taken in turn from each process."""
    in_turn = [bag_id for turn in zip_longest(*of_processes) for bag_id in turn]
    return list(dict.fromkeys(bag_id for bag_id in in_turn if bag_id is not None))[:n_bags]


def _united(of_processes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    united: dict[str, Any] = {}
    for own in of_processes:
        for bag_id, value in own.items():
            # The first has it: later ones repeat bags whose attention they may not have kept.
            united.setdefault(bag_id, value)
    return united
