"""TemporalEnsembleCallback: holds the attention of every bag to its own past."""

from typing import Any

import torch
from jaxtyping import Float, Float16
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mil_anchor.anchor import check_decay
from mil_anchor.attention import kl_divergence, log_softmax
from mil_anchor.callbacks.processes import gather_objects, tell
from mil_anchor.callbacks.recorder import batch_entry
from mil_anchor.callbacks.regularizer import AttentionRegularizer
from mil_anchor.schedules import Schedule
from mil_anchor.sites.base import RecordedAttention, Site


class TemporalEnsembleCallback(AttentionRegularizer):
    """Adds ``weight x KL(ensemble ‖ attention)`` to the training loss, with an ensemble per bag.

    The ensemble of a bag is the EMA of the attention that it had in earlier visits,
    ``e <- m e + (1 - m) a`` once per visit, with the attention a of that training step. The first
    visit starts it (``e = a``, no penalty), and so does a visit with another number of instances
    or rows, or without any instance that the ensemble has seen. Unlike an anchor it costs no second
    forward, but memory that grows with the data, and it lags by epochs instead of steps.

    The batch must have a ``bag_id`` for each bag, the attention block must see every bag once in a
    step, and the instances of a bag must come in the same order in every epoch.

    Ensembles are kept on the CPU as float16 of ``sqrt(e)``: 2 bytes for each bag, row and instance,
    and a relative error of at most 0.001 in e above 4e-9. An ensemble stops moving where the
    attention differs from it by less than a share of ``0.002 / (1 - m)``: choose m below 0.99.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        weight: Coefficient of the divergence, at least 0.
        decay: EMA factor m per visit of a bag, thus per epoch, in [0, 1); 0 keeps the last visit.
        schedule: How the weight changes while the model trains: a name or a `Schedule`.
        scope: Watch the attention ``"block"`` alone or the ``"encoder"`` in front of it too; the
            penalty is the same.
        strict: Whether scores that no softmax of the model has got are an error or a warning.

    Raises:
        ValueError: An argument is out of range; the message names it.

    Logs ``temporal/kl`` (the divergence in nats, mean over the epoch's distributions, first visits
    being 0), ``temporal/loss`` (the epoch's mean weight x kl) and ``temporal/memory_mb``.

    Source: ASMIL (arXiv 2603.06658), eq. 36. The paper's divergence could not be recovered: ours is
    that of its eq. 7, with the ensemble in place of the anchor. Unlike Laine and Aila's ensembles
    (arXiv 1610.02242) ours start from the first visit, not from zero, and need no correction.
    """

    def __init__(
        self,
        site: Site | str | None = None,
        *,
        weight: float,
        decay: float,
        schedule: Schedule | str = "constant",
        scope: str = "block",
        strict: bool = True,
    ) -> None:
        super().__init__(site, weight=weight, schedule=schedule, scope=scope, strict=strict)
        check_decay(decay)
        self.decay = decay
        self._ensembles: dict[str, Float16[Tensor, "row instance"]] = {}
        self._visited: dict[str, Float16[Tensor, "row instance"]] = {}
        self._n_seen = 0
        self._is_restored = False

    @property
    def memory_mb(self) -> float:
        """Memory that the ensembles take in this process, in 10^6 bytes."""
        stored = (ensemble.untyped_storage().nbytes() for ensemble in self._ensembles.values())
        return sum(stored) / 1e6

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Every fit has ensembles of its own, or those of the checkpoint loaded next.
        self._keep({})
        self._is_restored = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None and not self._is_restored:
            tell(
                f"The checkpoint {trainer.ckpt_path} holds no ensembles for {self.state_key}: "
                "every bag starts a new one."
            )
        super().on_train_start(trainer, pl_module)

    @override
    def start_step(self, batch: Any) -> None:
        super().start_step(batch)
        self._n_seen = 0

    @override
    def take_term(self) -> Tensor | None:
        term = super().take_term()
        if self._n_seen != len(batch_entry(self._batch, "bag_id")):
            raise ValueError(self._describe_mismatch())
        return term

    @override
    def penalty(self, attention: RecordedAttention) -> Float[Tensor, "bag row"]:
        log_online = log_softmax(attention.scores, attention.mask)
        ids = self._next_ids(len(log_online))
        of_bags = zip(ids, attention.by_bag(log_online), strict=True)
        return torch.stack([self._visit(bag_id, of_bag) for bag_id, of_bag in of_bags])

    @override
    def log_values(self, penalty: Tensor) -> dict[str, Tensor]:
        return {
            "temporal/kl": penalty,
            "temporal/loss": self.mean_weight * penalty,
            "temporal/memory_mb": penalty.new_tensor(self.memory_mb),
        }

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The next epoch may bring a bag to another process.
        self._keep(self._united())
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ensembles": self._united()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._keep(state_dict["ensembles"])
        self._is_restored = True

    def _visit(
        self, bag_id: str, log_online: Float[Tensor, "row instance"]
    ) -> Float[Tensor, " row"]:
        """The penalty of a bag's visit, which joins its ensemble."""
        attention = log_online.detach().exp()
        past = self._ensembles.get(bag_id)
        if past is None or not _covers(past, attention):
            penalty, ensemble = attention.new_zeros(len(attention)), attention
        else:
            log_past = log_softmax(2 * past.to(attention).log())
            # Of what the model masks in this step, neither has any.
            log_target = log_softmax(log_past.masked_fill(log_online == -torch.inf, -torch.inf))
            penalty = kl_divergence(log_target, log_online)
            ensemble = torch.lerp(attention, log_past.exp(), self.decay)
        # Square roots: float16 holds them to 0.05 %, down to an attention of 4e-9.
        stored = ensemble.sqrt().half().cpu()
        self._ensembles[bag_id] = self._visited[bag_id] = stored
        return penalty

    def _next_ids(self, n_bags: int) -> list[str]:
        """The ids of the next bags of the batch: a model may take them one by one."""
        ids = batch_entry(self._batch, "bag_id")
        if ids is None:
            raise ValueError(
                f"{type(self).__name__} keeps an ensemble for each bag, so the batch must name its "
                "bags, but it has no 'bag_id'. Add a list with one id per bag to the batch."
            )
        first, self._n_seen = self._n_seen, self._n_seen + n_bags
        if self._n_seen > len(ids):
            raise ValueError(self._describe_mismatch())
        return [str(bag_id) for bag_id in ids[first : self._n_seen]]

    def _describe_mismatch(self) -> str:
        ids = batch_entry(self._batch, "bag_id")
        return (
            f"{type(self).__name__} must see one attention per bag and step, but the attention "
            f"block gave {self._n_seen} or more for the {len(ids)} bag ids {ids}. Name a block "
            "that sees every bag whole and once."
        )

    def _united(self) -> dict[str, Float16[Tensor, "row instance"]]:
        """The ensembles of all processes; of a bag that several visited, the last one's."""
        united = dict(self._ensembles)
        for visited in gather_objects(self._visited):
            united |= visited
        return united

    def _keep(self, ensembles: dict[str, Float16[Tensor, "row instance"]]) -> None:
        self._ensembles, self._visited = dict(ensembles), {}


def _covers(past: Float16[Tensor, "..."], attention: Float[Tensor, "row instance"]) -> bool:
    """Whether the ensemble is of these instances, and of one that counts now in every row."""
    if past.shape != attention.shape:
        return False
    common = (past.to(attention.device) > 0) & (attention > 0)
    return bool(common.any(dim=-1).all())
