"""BagFeatures: keeps the vector by which a model classifies each validation bag, epoch by epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float16, Int64
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from mil_anchor.callbacks.processes import gather_objects
from mil_anchor.callbacks.recorder import CallRecorder, bag_ids, batch_entry
from mil_anchor.sites.base import ModuleCall, describe, find_submodule, tensors_in

FEATURES_FOLDER = "bag_features"

_LARGEST = float(np.finfo(np.float16).max)


class EpochFeatures(NamedTuple):
    """The validation bags of one epoch."""

    epoch: int
    bag_ids: list[str]
    labels: Int64[np.ndarray, " bag"]
    features: Float16[np.ndarray, "bag width"]


class BagFeatures(Callback):
    """Keeps the bag feature of every validation bag in every epoch, without a forward of its own.

    A bag feature is the input of the layer that puts out the logits: what is left of a bag when its
    instances are pooled. Of several rows (one per class, say) it is all of them in turn. Weights
    that a callback swaps in for validation are the ones that it comes from.

    Each epoch is a file ``<epoch>.npz`` of a folder, with the arrays ``bag_id``, ``label`` and
    ``features (bag, width)`` in float16, to be read by `read_bag_features`. A fit that is resumed
    writes the epochs that it repeats anew. Features that are not found are a warning, and the end
    of it: they must not cost the run.

    Args:
        head: Path of the layer that puts out the logits, seen from the LightningModule. None: the
            linear layer called ``head``, else the last linear layer (or 1-D convolution) in the
            first validation batch that gives each bag one vector, which must have one entry or one
            per class where the data module tells ``n_classes``.
        path: The folder; None: ``bag_features`` in the Trainer's log folder.

    Source: the t-SNE of bag features over epochs is App. C of ASMIL (arXiv 2603.06658).
    """

    def __init__(self, head: str | None = None, *, path: str | Path | None = None) -> None:
        self.head = head
        self.path = path
        self._folder = Path()
        self._recorder: CallRecorder | None = None
        self._name = head
        self._why_not = ""
        self._of_bags: dict[str, tuple[int, np.ndarray]] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # log_dir is a collective call: every rank asks.
        folder = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.path) if self.path is not None else Path(folder) / FEATURES_FOLDER
        if trainer.is_global_zero:
            for epoch, file in _files(self._folder).items():
                if epoch >= trainer.current_epoch:
                    file.unlink()
        self._of_bags, self._why_not, self._name = {}, "", self.head
        try:
            watched = _linear_layers(pl_module)
            if self.head is not None:
                watched = {self.head: find_submodule(pl_module, self.head)}
            self._recorder = CallRecorder(watched, only_with_grad=False)
        except ValueError as error:
            self._recorder = CallRecorder({}, only_with_grad=False)
            self._why_not = str(error)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._recorder is not None and not self._why_not:
            self._recorder.start()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._recorder is None or self._why_not:
            return
        try:
            labels = _labels(batch)
            features = _by_bag(self._take(trainer, len(labels)), len(labels))
            self._check_width(features)
        except ValueError as error:
            self._why_not = str(error)
            return
        ids = bag_ids(batch, len(labels), f"{dataloader_idx}:{batch_idx}")
        for bag_id, label, feature in zip(ids, labels, features, strict=True):
            self._of_bags[bag_id] = label, feature

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None:
            return
        # A process that cannot go on asks, too: all of them stop together.
        of_processes = gather_objects((self._of_bags, self._why_not))
        self._of_bags = {}
        why_not = next((why for _, why in of_processes if why), None)
        if why_not is not None:
            rank_zero_warn(f"Bag features are not kept: {why_not}")
            self._detach()
            return
        # By id, so each bag once: a distributed sampler may repeat bags.
        united = {bag_id: bag for own, _ in of_processes for bag_id, bag in own.items()}
        if united and trainer.is_global_zero:
            _write(self._folder / f"{trainer.current_epoch}.npz", united)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _take(self, trainer: Trainer, n_bags: int) -> list[ModuleCall]:
        """The head's calls on this batch; in the first one it is found."""
        if self._recorder is None:
            return []
        calls = self._recorder.calls
        self._recorder.stop()
        if self._name is not None:
            return calls
        n_classes = getattr(trainer.datamodule, "n_classes", None)  # type: ignore[attr-defined]
        self._name = _find_head(calls, n_bags, n_classes)
        found = [call for call in calls if call.name == self._name]
        # From now on only the head: what the other layers get needs memory.
        self._recorder.remove()
        self._recorder = CallRecorder({self._name: found[0].module}, only_with_grad=False)
        return found

    def _check_width(self, features: Float16[np.ndarray, "bag width"]) -> None:
        _, earlier = next(iter(self._of_bags.values()), (0, features[0]))
        if len(earlier) != features.shape[1]:
            raise ValueError(
                "The bag features of all bags must have one width, but the layer that puts out "
                f"the logits got {len(earlier)} and {features.shape[1]} numbers. Name another: "
                "BagFeatures(head=...)."
            )

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
        self._of_bags = {}


def read_bag_features(folder: Path) -> list[EpochFeatures]:
    """What a run's folder ``bag_features`` holds, by epoch.

    Raises:
        ValueError: It holds no epoch.
    """
    files = _files(folder)
    if not files:
        raise ValueError(
            f"{folder} must hold the bag features of an epoch, but there are none. Train with "
            "bag_features=true, or with the callback BagFeatures."
        )
    return [_read(epoch, file) for epoch, file in sorted(files.items())]


def _read(epoch: int, file: Path) -> EpochFeatures:
    with np.load(file) as arrays:
        ids: list[str] = arrays["bag_id"].tolist()
        return EpochFeatures(epoch, ids, arrays["label"], arrays["features"])


def _write(file: Path, of_bags: Mapping[str, tuple[int, np.ndarray]]) -> None:
    """In one piece: a stopped process leaves no half of a file behind."""
    labels, features = zip(*of_bags.values(), strict=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(
            stream,
            bag_id=np.array(list(of_bags)),
            label=np.array(labels, dtype=np.int64),
            features=np.stack(features),
        )
    partial.replace(file)


def _files(folder: Path) -> dict[int, Path]:
    return {int(file.stem): file for file in folder.glob("*.npz") if file.stem.isdigit()}


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    # A 1-D convolution over the whole width is how DSMIL classifies its pooled rows.
    kinds = (nn.Linear, nn.Conv1d)
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def _labels(batch: Any) -> list[int]:
    label = batch_entry(batch, "label")
    if not isinstance(label, Tensor) or label.ndim != 1:
        raise ValueError(
            "A batch must have the labels of its bags under 'label', one number each, but it has "
            f"{describe(label)} there. Validate on such batches."
        )
    return [int(number) for number in label.tolist()]


def _find_head(calls: Sequence[ModuleCall], n_bags: int, n_classes: int | None) -> str:
    """The name of the layer that puts out the logits of these bags."""
    called: dict[str, list[ModuleCall]] = {}
    for call in calls:
        # Taken out first: the order is that of the last calls.
        called[call.name] = [*called.pop(call.name, []), call]
    named = [name for name in called if name.split(".")[-1] == "head"]
    if len(named) == 1:
        return named[0]
    widths = {name: _width(of_layer, n_bags) for name, of_layer in called.items()}
    fitting = [
        name
        for name, width in widths.items()
        if width is not None and (n_classes is None or width in (1, n_classes))
    ]
    if not fitting:
        raise ValueError(
            "The last linear layer must give each bag one vector of logits, but of the layers "
            f"{list(called)} that ran on {n_bags} bag(s) none does. Name it: BagFeatures(head=...)."
        )
    return fitting[-1]


def _width(calls: Sequence[ModuleCall], n_bags: int) -> int | None:
    """Entries of the one vector that a layer has given each bag; None if it gave more or less."""
    module = calls[0].module
    if not isinstance(module, nn.Linear | nn.Conv1d):
        return None
    width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    total = sum(x.numel() for call in calls for x in tensors_in(call.output))
    return width if total == n_bags * width else None


def _by_bag(calls: Sequence[ModuleCall], n_bags: int) -> Float16[np.ndarray, "bag width"]:
    """The head's inputs, one row for each bag."""
    inputs = [call.features for call in calls if call.features is not None]
    if len(inputs) == 1 and len(inputs[0]) == n_bags:
        bags = inputs[0].flatten(1)
    elif inputs and len(inputs) == n_bags and len({x.shape for x in inputs}) == 1:
        # A model that takes its bags one by one.
        bags = torch.stack([one.flatten() for one in inputs])
    else:
        raise ValueError(
            "The layer that puts out the logits must run once on a batch, or once for each bag, "
            f"but on {n_bags} bag(s) it got {[tuple(x.shape) for x in inputs]}. Name another "
            "layer: BagFeatures(head=...)."
        )
    features: np.ndarray = bags.detach().float().cpu().numpy()
    if not (np.abs(features) <= _LARGEST).all():
        raise ValueError(
            f"Bag features must be finite and at most {_LARGEST} to be kept in float16, but there "
            f"are {features.min()} to {features.max()}. Normalise what the head gets."
        )
    return features.astype(np.float16)
