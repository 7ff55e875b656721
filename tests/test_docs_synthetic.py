"""Commands, figures, generated parts and claims of docs/synthetic.md."""

import csv
import itertools
import json
import math
import re
import shlex
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from scipy.stats import rankdata

from docs.synthetic import MEASURED, N_WORLDS, PAGE, page
from docs.synthetic_figures import draw_cohort, draw_curves, draw_epochs
from docs.synthetic_measures import Setting, measure_cohort, measure_run, read_curves
from mil_anchor.__main__ import main
from mil_anchor.composition import check_arguments
from mil_anchor.data.synthetic import PRESETS, SyntheticCohort
from mil_anchor.experiment import run
from mil_anchor.maps.file import read_map, read_maps
from mil_anchor.results import Run
from tests.composing import ROOT, composed

TEXT = PAGE.read_text()
MEASURES = json.loads(MEASURED.read_text())
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]


def _settings(command):
    """The settings of the runs that a command with the experiment makes."""
    file = ROOT / "conf" / "experiment" / "synthetic_abmil.yaml"
    swept = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
    swept |= dict(part.split("=") for part in shlex.split(command)[4:])
    keys = [key for key in swept if key != "data.fold"]
    assert str(swept["data.fold"]).count(",") == N_WORLDS - 1
    for values in itertools.product(*(str(swept[key]).split(",") for key in keys)):
        overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        config = composed("+experiment=synthetic_abmil", *overrides)
        yield Setting(config.data.preset, config.data.size, config.trainer.max_epochs)


def _setting(row):
    return Setting(row["preset"], row["size"], row["n_epochs"])


def _runs(preset, size="small", n_epochs=40):
    setting = Setting(preset, size, n_epochs)
    return [row for row in MEASURES["runs"] if _setting(row) == setting]


def _mean(preset, key, **setting):
    return fmean(row[key] for row in _runs(preset, **setting))


def _kept(folder):
    bags = [bag for bag in read_maps(folder / "attention.h5") if bag.epochs]
    assert len(bags) == 2
    return [bag.bag_id for bag in bags]


def _attention(folder, bag_id, epoch):
    return read_map(folder / "attention.h5", bag_id).attention(epoch).tolist()


def _artefact_auroc(folder):
    """By its definition: how often a slide with the artefact has the higher prediction."""
    cohort = SyntheticCohort("camelyon_like", "tiny", seed=0)
    artefact = {
        name: plan.artefact for name, plan in zip(cohort.bag_ids, cohort.plans, strict=True)
    }
    with (folder / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    with_it, without = (
        [float(row["prob_1"]) for row in rows if artefact[row["bag_id"]] is has]
        for has in (True, False)
    )
    return fmean((one > two) + (one == two) / 2 for one in with_it for two in without)


def test_synthetic__generated_parts__are_up_to_date():
    assert page(TEXT, MEASURES) == TEXT, "run: python -m docs.synthetic"
    for name in ("matches", "checks", "sizes", "failures"):
        assert len(TEXT.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]) > 200


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python run.py")])
def test_synthetic__run_command__composes(command):
    check_arguments(composed(*(part for part in shlex.split(command)[2:] if part != "-m")))


def test_synthetic__commands_of_the_study__make_the_measured_runs():
    made = [
        setting
        for command in COMMANDS
        if "+experiment=synthetic_abmil" in command
        for setting in _settings(command)
    ]

    measured = [(_setting(row), row["world"]) for row in MEASURES["runs"]]
    assert sorted(measured) == sorted(itertools.product(made, range(N_WORLDS)))


def test_synthetic__synthesize_command__writes_a_cohort(tmp_path, monkeypatch):
    (command,) = (c for c in COMMANDS if c.startswith("python -m mil_anchor"))
    monkeypatch.chdir(tmp_path)

    assert main(shlex.split(command.replace("medium", "tiny"))[3:]) == 0

    assert {"labels.csv", "splits_0.csv", "h5_files"} <= {f.name for f in Path("cohort").iterdir()}


def test_synthetic__other_commands__are_known():
    known = ("python run.py", "python -m mil_anchor synthesize", "python -m docs.synthetic ")
    assert all(command.startswith(known) for command in COMMANDS)


def test_synthetic__figures__are_small_and_show_something():
    shown = re.findall(r"!\[.*\]\((.*)\)", TEXT)

    assert {PAGE.parent / name for name in shown} == set((PAGE.parent / "figures").glob("*.png"))
    for name in shown:
        file = PAGE.parent / name
        assert file.stat().st_size < 300_000
        assert imread(file)[..., :3].std() > 0.05


@pytest.mark.slow
def test_measure_cohort__a_world_of_the_page__gives_its_figures():
    measured = measure_cohort("bracs_like", 1)

    assert measured == pytest.approx(MEASURES["cohorts"]["bracs_like"][1], abs=0.005)


@pytest.mark.slow
def test_read_curves__short_run__agrees_with_the_run_itself(tmp_path):
    overrides = ("data=synthetic", "data.size=tiny", "maps=2", "trainer.enable_progress_bar=false")
    metrics = run(composed(*overrides, "trainer.max_epochs=6", folder=tmp_path))
    own = Run(tmp_path, metrics)

    curves = read_curves(own)
    measured = measure_run(own, curves)

    assert [len(values) for values in curves] == [5, 6, 6, 6, 5, 5, 6, 6, 6]
    assert fmean(curves.jsd) == pytest.approx(metrics["attention/jsd"])
    assert curves.entropy[-1] == pytest.approx(metrics["attention/entropy"])
    best = metrics["best_epoch"]
    assert curves.val_loss[best] == pytest.approx(metrics["val/loss"], abs=1e-5)
    assert curves.val_auroc[best] == pytest.approx(metrics["val/auroc"], abs=1e-5)
    before, after = (
        [_attention(tmp_path, bag, epoch) for bag in _kept(tmp_path)] for epoch in (4, 5)
    )
    assert curves.largest[-1] == pytest.approx(fmean(map(max, after)))
    top = [sum(sorted(own)[-math.ceil(len(own) / 100) :]) for own in after]
    assert curves.top_share[-1] == pytest.approx(fmean(top))
    first = [np.argmax(one) != np.argmax(two) for one, two in zip(before, after, strict=True)]
    assert curves.changed[-1] == np.mean(first)
    ranks = [[rankdata(own) for own in pair] for pair in zip(before, after, strict=True)]
    rank = np.mean([np.corrcoef(*pair)[0, 1] for pair in ranks])
    assert curves.rank[-1] == pytest.approx(rank, abs=1e-4)
    assert (measured["preset"], measured["size"], measured["n_epochs"]) == Setting.of(own)
    assert measured["val_loss_lowest"] == pytest.approx(min(curves.val_loss), abs=1e-5)
    assert measured["artefact_auroc"] == pytest.approx(_artefact_auroc(tmp_path), abs=1e-5)
    assert measured["test/auroc"] == pytest.approx(metrics["test/auroc"], abs=1e-5)


def test_claims__jumping__is_there_while_the_model_learns():
    for preset in PRESETS:
        assert _mean(preset, "jsd_third") > 0.02
        assert _mean(preset, "jsd_largest") > 1.5 * _mean(preset, "jsd_third")
        assert _mean(preset, "changed_two_thirds") > 0.2
        assert _mean(preset, "rank_two_thirds") > 0.9
        longer = _mean(preset, "jsd_two_thirds", n_epochs=120)
        assert 0.35 < longer / _mean(preset, "jsd_two_thirds") < 0.65


def test_claims__concentration__is_strong_in_every_run():
    for row in MEASURES["runs"]:
        assert row["entropy_first"] > 0.85
        assert row["entropy_last"] < 0.6
        assert row["top_share_last"] > 0.5
        assert row["localization/dice"] < 0.3
        assert row["localization/specificity"] > 0.95


def test_claims__overfitting__is_of_the_loss_and_early():
    for row in MEASURES["runs"]:
        assert row["train_loss_last"] < 0.1
        assert row["val_loss_lowest_epoch"] < 20
        assert row["val_loss_last"] > 1.2 * row["val_loss_lowest"]
    for preset in PRESETS:
        for one, other in zip(_runs(preset), _runs(preset, n_epochs=120), strict=True):
            assert one["val_loss_last"] < other["val_loss_last"]
        for n_epochs in (40, 120):
            before, after = (
                _mean(preset, f"val_auroc_{when}", n_epochs=n_epochs) for when in ("lowest", "last")
            )
            assert abs(before - after) < 0.07


def test_claims__shortcut__is_taken_in_part_and_in_camelyon_like_only():
    for n_epochs in (40, 120):
        assert 0.55 < _mean("camelyon_like", "artefact_auroc", n_epochs=n_epochs) < 0.75
        assert 0.4 < _mean("bracs_like", "artefact_auroc", n_epochs=n_epochs) < 0.6
        probe = fmean(row["tile_test"] for row in MEASURES["cohorts"]["camelyon_like"])
        for key in ("test/auroc", "localization/auroc"):
            assert _mean("camelyon_like", key, n_epochs=n_epochs) < probe - 0.15
    cohorts = MEASURES["cohorts"]["camelyon_like"]
    artefact, pooled = (
        fmean(row[key] for row in cohorts) for key in ("artefact_fit", "pooled_val")
    )
    assert abs(artefact - pooled) < 0.1


@pytest.mark.slow
def test_figures__a_run_of_40_epochs__are_drawn(tmp_path):
    overrides = ("data=synthetic", "data.size=tiny", "maps=2", "trainer.enable_progress_bar=false")
    own = Run(tmp_path, run(composed(*overrides, folder=tmp_path)))

    draw_curves({"camelyon_like": [read_curves(own)]}, tmp_path / "curves.png")
    draw_epochs(tmp_path, tmp_path / "epochs.png")
    draw_cohort(tmp_path / "cohort.png")

    for name in ("curves", "epochs", "cohort"):
        assert imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05
