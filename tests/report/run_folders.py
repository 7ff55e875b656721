"""Run folders with known content, written by hand."""

import csv
import json
from pathlib import Path

import torch

from mil_anchor.callbacks.monitor import AttentionRow
from mil_anchor.data.bags import Bag, PixelCoords
from mil_anchor.maps.file import MapWriter

N_EPOCHS = 4


def write_run(
    root,
    *,
    data="synthetic",
    model="abmil",
    plugin="none",
    seed=0,
    slides=("slide_a",),
    keeps=("attention", "logs", "predictions", "maps", "environment"),
    **metrics,
) -> Path:
    """A complete run that keeps what is named; its numbers follow from its seed and plug-in."""
    folder = root / data / model / plugin / f"seed={seed}"
    folder.mkdir(parents=True)
    own = {"model": model, "plugin": plugin, "data": data, "seed": seed, "fold": 0}
    config = {
        "names": {key: own[key] for key in ("model", "plugin", "data")},
        "seed": seed,
        "data": {"fold": 0},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(100 * seed + len(plugin))
    if "attention" in keeps:
        write_attention(folder, [[0.1 * 2.0**-epoch] * 2 for epoch in range(N_EPOCHS)])
    if "logs" in keeps:
        write_log(folder, 0, [(epoch, 1 / (1 + epoch), 0.5) for epoch in range(N_EPOCHS)])
    if "predictions" in keeps:
        write_predictions(folder, torch.rand(12, generator=generator).tolist())
    if "environment" in keeps:
        (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "gpu": None}))
    if "maps" in keeps:
        for slide in slides:
            write_map(folder, slide, generator=generator)
    own |= {"test/f1": 0.5 + 0.1 * seed, "attention/jsd": 0.01, **metrics}
    (folder / "metrics.json").write_text(json.dumps(own))
    return folder


def write_attention(folder, jsd_of_epochs) -> None:
    """``attention.csv`` with the JSD of every bag in every epoch; None in the first one."""
    with (folder / "attention.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(AttentionRow._fields)
        for epoch, values in enumerate(jsd_of_epochs):
            for bag, jsd in enumerate(values):
                jsd = None if epoch == 0 else jsd
                writer.writerow(
                    [epoch, f"bag_{bag}", "online", jsd, None, 0.9, 0.2, 0.3, None, None]
                )


def write_log(folder, version, epochs, *, torn="") -> None:
    """A log of the fit as Lightning's CSV logger writes it, and of the validation after it."""
    file = folder / "logs" / f"version_{version}" / "metrics.csv"
    file.parent.mkdir(parents=True)
    lines = ["epoch,step,train/loss,val/auroc,val/f1,val/loss"]
    for epoch, train_loss, val_loss in epochs:
        lines.append(f"{epoch},{epoch},,,0.25,{val_loss}")
        lines.append(f"{epoch},{epoch},{train_loss},,,")
    lines.append(f"{epochs[-1][0] + 1},99,,,1.0,99.0")
    file.write_text("\n".join(lines) + "\n" + torn)


def write_predictions(folder, probabilities) -> None:
    """``predictions.csv`` of test bags with these probabilities of class 1."""
    lines = ["bag_id,label,split,prob_0,prob_1"]
    for index, probability in enumerate(probabilities):
        lines.append(f"bag_{index},{index % 2},test,{1 - probability},{probability}")
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")


def write_map(folder, bag_id, *, generator, n_epochs=N_EPOCHS, side=5, lesion=True) -> None:
    """The attention on a square slide, in all epochs."""
    xy = torch.cartesian_prod(torch.arange(side), torch.arange(side)) * 256
    labels = torch.zeros(side**2, dtype=torch.long)
    labels[side + 1] = 1
    bag = Bag(
        torch.zeros(side**2, 1),
        1,
        bag_id,
        coords=PixelCoords(xy, 256.0),
        instance_label=labels if lesion else None,
    )
    writer = MapWriter(folder / "attention.h5")
    writer.add_bag(bag, "val")
    for epoch in range(n_epochs):
        scores = torch.randn(1, side**2, generator=generator)
        writer.add_epoch(bag_id, epoch, scores.log_softmax(dim=1))
