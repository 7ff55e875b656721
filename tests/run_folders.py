"""Writes run folders by hand, with numbers that a test knows."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

# Keys of metrics.json that have no part.
_WHOLE = ("in_features", "weights")

CONFIG = {
    "model": {"_target_": "baselines.abmil.ABMIL", "hidden": 64},
    "plugin": {},
    "data": {"fold": 0, "seed": 0, "n_folds": 10},
    "module": {"lr": 0.001},
    "trainer": {"max_epochs": 20, "devices": 1},
    "names": {},
    "seed": 0,
    "hidden": 64,
    "site": None,
    "out": "outputs",
}


def write_run(
    root: Path,
    plugin: str = "none",
    seed: int = 0,
    *,
    fold: int = 0,
    model: str = "abmil",
    data: str = "musk1",
    settings: dict[str, Any] | None = None,
    predictions: list[tuple[str, int, float]] | None = None,
    environment: dict[str, Any] | None = None,
    complete: bool = True,
    **metrics: float | str,
) -> Path:
    """Write one run below ``root`` and return its folder.

    Args:
        root: Where run folders lie.
        plugin: Name; likewise the next ones.
        seed: See ``plugin``.
        fold: See ``plugin``.
        model: See ``plugin``.
        data: See ``plugin``.
        settings: Configuration by dotted keys, beside `CONFIG`.
        predictions: Id, label and probability of class 1 of test bags.
        environment: For ``environment.json``.
        complete: Whether there is a ``metrics.json``.
        metrics: For ``metrics.json``, ``f1`` meaning ``test/f1`` and ``time__epoch_s``
            ``time/epoch_s``.
    """
    settings = settings or {}
    own = ",".join(
        f"{key}={value}" for key, value in {"seed": seed, "fold": fold, **settings}.items()
    )
    folder = root / model / plugin / data / own.replace("/", "_")
    folder.mkdir(parents=True)
    names = {"model": model, "plugin": plugin, "data": data}
    config = OmegaConf.create(copy.deepcopy(CONFIG) | {"names": names, "seed": seed})
    for key, value in {"data.fold": fold, "data.seed": seed, **settings}.items():
        OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    if complete:
        keyed = {
            key.replace("__", "/") if "__" in key or key in _WHOLE else f"test/{key}": value
            for key, value in metrics.items()
        }
        written = {**names, "seed": seed, "fold": fold, "weights": "online", **keyed}
        (folder / "metrics.json").write_text(json.dumps(written))
    if predictions is not None:
        with (folder / "predictions.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["bag_id", "label", "split", "prob_0", "prob_1"])
            writer.writerows([bag, label, "test", 1 - p, p] for bag, label, p in predictions)
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder
