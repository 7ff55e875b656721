"""Measures what synthetic.md tells of cohorts and runs."""

import csv
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from mil_anchor.attention import top_mass
from mil_anchor.data.synthetic import SyntheticCohort
from mil_anchor.maps.file import MAPS_FILE, read_map, read_maps
from mil_anchor.predictions import PREDICTIONS_FILE, read_predictions
from mil_anchor.results import Run
from tests.data.synthetic.test_claims import measure as linear_models

_METRICS = (
    "best_epoch",
    "val/auroc",
    "test/auroc",
    "test/f1",
    "localization/auroc",
    "localization/average_precision",
    "localization/lesion_any",
    "localization/dice",
    "localization/specificity",
    "localization/froc",
)


class Setting(NamedTuple):
    """Runs that differ in their world only."""

    preset: str
    size: str
    n_epochs: int

    @classmethod
    def of(cls, run: Run) -> "Setting":
        """The setting of a run."""
        config = OmegaConf.load(run.folder / "config.yaml")
        return cls(config.data.preset, config.data.size, config.trainer.max_epochs)


class Curves(NamedTuple):
    """What a run shows in every epoch; means over slides."""

    jsd: list[float]  # of validation slides to the epoch before, from the second epoch on
    entropy: list[float]  # of validation slides, / ln N
    largest: list[float]  # attention of the kept slides' first tile
    top_share: list[float]  # attention of the kept slides' first 1 % of tiles
    rank: list[float]  # of kept slides with the epoch before, from the second epoch on
    changed: list[float]  # share of kept slides whose first tile is another, from the second on
    train_loss: list[float]
    val_loss: list[float]
    val_auroc: list[float]


def read_curves(run: Run) -> Curves:
    """Every epoch of a run."""
    rows = run.attention()
    n_epochs = 1 + max(row.epoch for row in rows)
    jsd, entropy = (
        [[getattr(row, name) for row in rows if row.epoch == epoch] for epoch in range(n_epochs)]
        for name in ("jsd", "entropy")
    )
    kept = [
        torch.stack([slide.log_attention[epoch][0].double() for epoch in range(n_epochs)])
        for slide in (
            read_map(run.folder / MAPS_FILE, bag.bag_id)
            for bag in read_maps(run.folder / MAPS_FILE)
            if bag.epochs
        )
    ]
    pairs = range(1, n_epochs)
    first = [log_attention.argmax(dim=1) for log_attention in kept]
    return Curves(
        jsd=[fmean(values) for values in jsd[1:]],
        entropy=[fmean(values) for values in entropy],
        largest=_mean([log_attention.exp().amax(dim=1) for log_attention in kept]),
        top_share=_mean([top_mass(log_attention, share=0.01) for log_attention in kept]),
        rank=[fmean(float(spearmanr(own[e - 1], own[e])[0]) for own in kept) for e in pairs],
        changed=_mean([(own[1:] != own[:-1]).double() for own in first]),
        train_loss=_logged(run, "train/loss", n_epochs),
        val_loss=_logged(run, "val/loss", n_epochs),
        val_auroc=_logged(run, "val/auroc", n_epochs),
    )


def measure_run(run: Run, curves: Curves) -> dict[str, Any]:
    """The figures of a run that the page shows."""
    config = OmegaConf.load(run.folder / "config.yaml")
    world = config.data.world + config.data.fold
    cohort = SyntheticCohort(config.data.preset, config.data.size, seed=world)
    n_epochs = len(curves.entropy)
    third, two_thirds = n_epochs // 3, 2 * n_epochs // 3
    lowest = int(np.argmin(curves.val_loss))
    measured = {
        "jsd_third": fmean(curves.jsd[:third]),
        "jsd_two_thirds": fmean(curves.jsd[:two_thirds]),
        "jsd_largest": max(curves.jsd),
        "rank_two_thirds": fmean(curves.rank[:two_thirds]),
        "changed_two_thirds": fmean(curves.changed[:two_thirds]),
        "entropy_first": curves.entropy[0],
        "entropy_last": curves.entropy[-1],
        "largest_last": curves.largest[-1],
        "top_share_last": curves.top_share[-1],
        "train_loss_last": curves.train_loss[-1],
        "val_loss_lowest": curves.val_loss[lowest],
        "val_loss_lowest_epoch": lowest,
        "val_loss_last": curves.val_loss[-1],
        "val_auroc_lowest": curves.val_auroc[lowest],
        "val_auroc_last": curves.val_auroc[-1],
        "fit_s": run.metrics["time/fit_s"],
        "artefact_auroc": _artefact_auroc(run, cohort),
        **{key: run.metrics[key] for key in _METRICS},
    }
    return {
        **Setting.of(run)._asdict(),
        "world": cohort.seed,
        **{key: round(float(value), 5) for key, value in measured.items()},
    }


def measure_cohort(preset: str, world: int) -> dict[str, float]:
    """The figures of a small cohort that the page shows."""
    cohort = SyntheticCohort(preset, "small", seed=world)
    bags = cohort[:]
    pooled = np.concatenate([bag.features.numpy()[::4] for bag in bags])
    variance = np.linalg.eigvalsh(np.cov(pooled, rowvar=False))[::-1]
    component = np.arange(1, len(variance) + 1)
    cosines = []
    for bag in bags:
        centred = bag.features - bag.features.mean(dim=0)
        cell = {tuple(xy): i for i, xy in enumerate((bag.coords.xy // bag.coords.pitch).tolist())}
        right = [(i, cell[x + 1, y]) for (x, y), i in cell.items() if (x + 1, y) in cell]
        left, neighbour = torch.tensor(right).T
        cosines.append(float(torch.cosine_similarity(centred[left], centred[neighbour]).mean()))
    witness = [
        float((bag.instance_label == label).double().mean())
        for bag, label in zip(bags, cohort.true_labels, strict=True)
        if label > 0
    ]
    n_tiles = [len(bag.features) for bag in bags]
    measured = {
        "spectrum_slope": np.polyfit(np.log(component), np.log(variance), 1)[0],
        "neighbour_cosine": fmean(cosines),
        "tiles_log_sd": stdev(np.log(n_tiles).tolist()),
        "witness_median": np.median(witness),
        "witness_below_1pct": np.mean(np.array(witness) < 0.01),
        "artefact_fit": _artefact_sign(cohort, cohort.parts.train + cohort.parts.val),
        "artefact_test": _artefact_sign(cohort, cohort.parts.test),
        **linear_models(cohort),
    }
    return {key: round(float(value), 5) for key, value in measured.items()}


def _mean(of_slides: Sequence[torch.Tensor]) -> list[float]:
    return torch.stack(list(of_slides)).mean(dim=0).tolist()


def _logged(run: Run, key: str, n_epochs: int) -> list[float]:
    """What Lightning's CSV holds for every epoch of the fit; evaluation afterwards has its own."""
    with (run.folder / "logs" / "version_0" / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row[key]]
    return [float(row[key]) for row in rows if int(row["epoch"]) < n_epochs]


def _artefact_auroc(run: Run, cohort: SyntheticCohort) -> float:
    """How well the prediction of a lesion tells whether a test slide has the artefact."""
    plans = dict(zip(cohort.bag_ids, cohort.plans, strict=True))
    tested = read_predictions(run.folder / PREDICTIONS_FILE).of_part("test")
    artefact = [plans[bag_id].artefact for bag_id in tested.bag_ids]
    return float(roc_auc_score(artefact, 1 - tested.probabilities[:, 0]))


def _artefact_sign(cohort: SyntheticCohort, indices: Sequence[int]) -> float:
    """How well the artefact alone tells that a slide is given a class with a lesion."""
    labels = [cohort.labels[index] > 0 for index in indices]
    return float(roc_auc_score(labels, [cohort.plans[index].artefact for index in indices]))
