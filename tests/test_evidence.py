import csv
import logging
import sys

import pytest
import torch

from mil_anchor.data.bags import Bag, PixelCoords
from mil_anchor.evidence import write_evidence
from mil_anchor.localization import SlideScores, localize
from mil_anchor.maps.file import MapWriter
from mil_anchor.module import Prediction
from mil_anchor.predictions import write_predictions

_GRID = torch.cartesian_prod(torch.arange(8), torch.arange(8))
_LESION = (_GRID < 3).all(dim=1).long()
_PITCH = 256


def _write_run(folder, *, lesion=_LESION, lesion_label=1, coords=True):
    """A lesion slide and a normal one in the test part, and what the model thought of them."""
    (folder / "config.yaml").write_text(
        "names: {model: abmil, plugin: none, data: folder}\nseed: 0\ndata: {fold: 0, mpp: null}\n"
    )
    writer = MapWriter(folder / "attention.h5")
    rows = []
    for label, probability in ((1, 0.75), (0, 0.5)):
        own = None if lesion is None else lesion * (label == lesion_label)
        place = PixelCoords(_GRID * _PITCH, float(_PITCH)) if coords else None
        bag = Bag(torch.ones(64, 2), label, f"slide{label}", coords=place, lesion=own)
        writer.add_bag(bag, "test")
        writer.add_best(bag.bag_id, _log_attention(label))
        rows.append(("test", Prediction(bag.bag_id, label, [1 - probability, probability])))
    write_predictions(folder / "predictions.csv", rows)
    return folder


def _log_attention(seed):
    scores = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
    return (scores + 2 * _LESION).log_softmax(dim=1)


def test_write_evidence__lesions_in_micrometres__measures_and_draws(tmp_path):
    metrics = write_evidence(_write_run(tmp_path), mpp=0.5, n_drawn=1)

    slides = [
        SlideScores(
            f"slide{label}",
            label,
            _log_attention(label).exp().mean(dim=0),
            lesion=_LESION * label,
        )
        for label in (1, 0)
    ]
    expected = localize(slides).metrics
    assert metrics.pop("localization/detections") == "nms, radius 275 um"
    assert metrics == pytest.approx({**expected, "localization/froc": 1.0}, abs=0.02)
    assert [file.name for file in (tmp_path / "heatmaps").iterdir()] == ["slide1.png"]
    with (tmp_path / "localization.csv").open() as file:
        assert [row["bag_id"] for row in csv.DictReader(file)] == ["slide1", "slide0"]


@pytest.mark.parametrize(
    ("mpp", "why"),
    [
        (None, "data.mpp says the micrometres per level-0 pixel"),
        (250.0, "must lie within 100 mm, but those of 'slide1' span 448 mm"),
    ],
)
def test_write_evidence__size_of_a_pixel_missing_or_wrong__costs_the_froc_only(
    tmp_path, caplog, mpp, why
):
    with caplog.at_level(logging.WARNING, "mil_anchor"):
        metrics = write_evidence(_write_run(tmp_path), mpp=mpp, n_drawn=0)

    assert "localization/froc" not in metrics
    assert {"localization/dice", "localization/lesion_any"} <= metrics.keys()
    assert (tmp_path / "localization.csv").exists()
    assert "No FROC: " in caplog.text
    assert why in caplog.text


def test_write_evidence__lesions_on_slides_of_class_0__says_that_the_classes_are_swapped(
    tmp_path, caplog
):
    write_evidence(_write_run(tmp_path, lesion_label=0), mpp=0.5, n_drawn=0)
    assert "Most slides with a lesion have class 0" in caplog.text


def test_write_evidence__slides_that_cannot_be_drawn__are_measured(tmp_path, caplog):
    metrics = write_evidence(_write_run(tmp_path, coords=False), mpp=0.5, n_drawn=2)

    assert "localization/dice" in metrics
    assert "bag 'slide1' came without coordinates" in caplog.text
    assert not (tmp_path / "heatmaps").exists()


def test_write_evidence__nothing_annotated__draws_and_says_nothing_of_lesions(tmp_path, caplog):
    assert write_evidence(_write_run(tmp_path, lesion=None), mpp=0.5, n_drawn=2) == {}
    assert len(list((tmp_path / "heatmaps").iterdir())) == 2
    assert not caplog.records
    assert not (tmp_path / "localization.csv").exists()


def test_write_evidence__no_scipy__costs_the_froc_only(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    metrics = write_evidence(_write_run(tmp_path), mpp=0.5, n_drawn=0)
    assert "localization/dice" in metrics
    assert "localization/froc" not in metrics
    assert "pip install 'mil_anchor[localization]'" in caplog.text


def test_write_evidence__no_maps__is_nothing(tmp_path):
    assert write_evidence(tmp_path, mpp=0.5, n_drawn=2) == {}


def test_write_evidence__diverged_predictions__cost_the_froc_only(tmp_path, caplog):
    file = _write_run(tmp_path) / "predictions.csv"
    file.write_text(file.read_text().replace("0.75", "nan"))

    metrics = write_evidence(tmp_path, mpp=0.5, n_drawn=0)

    assert "localization/dice" in metrics
    assert "localization/froc" not in metrics
    assert "No FROC: Probabilities must lie in [0, 1]" in caplog.text
