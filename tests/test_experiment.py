import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mil_anchor.callbacks.monitor import read_attention
from mil_anchor.data.synthetic import SyntheticCohort, write_cohort
from mil_anchor.experiment import run
from mil_anchor.maps.file import read_map, read_maps
from mil_anchor.results import read_runs
from tests.composing import ROOT, composed

QUIET = "trainer.enable_progress_bar=false"
RUN_FILES = {"config.yaml", "metrics.json", "predictions.csv", "attention.csv"}


def _run(folder, *overrides):
    return run(composed(QUIET, "trainer.max_epochs=2", *overrides, folder=folder))


def _without_times(metrics):
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}


def _started(folder, *overrides):
    command = [sys.executable, "run.py", *overrides, f"out={folder}", QUIET]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_run__complete__writes_the_whole_run_folder(tmp_path):
    metrics = _run(tmp_path, "plugin=anchor_nsf", "data.fold=1", "seed=3")

    assert {file.name for file in tmp_path.iterdir()} >= RUN_FILES
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["n_threads"] == 1  # the data set's
    # Written last, and by a rename.
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in RUN_FILES}
    assert max(written, key=written.__getitem__) == "metrics.json"
    assert not list(tmp_path.rglob("*.partial"))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    names = {"model": "abmil", "plugin": "anchor_nsf", "data": "ucsb_breast", "seed": 3, "fold": 1}
    assert metrics | names == metrics
    assert {"test/f1", "test/auroc", "test/accuracy", "val/score", "time/fit_s"} <= metrics.keys()
    costs = ("flops_step", "instances_step", "peak_memory_mb", "flops_inference")
    assert all(metrics[f"cost/{name}"] > 0 for name in costs)
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"bag_id", "label", "split", "prob_0", "prob_1"}
    tested = [row for row in rows if row["split"] == "test"]
    right = [row["label"] == str(int(float(row["prob_1"]) > 0.5)) for row in tested]
    assert metrics["test/accuracy"] == pytest.approx(sum(right) / len(right))
    validated = {row["bag_id"] for row in rows if row["split"] == "val"}
    assert {row.bag_id for row in read_attention(tmp_path / "attention.csv")} == validated
    assert torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["abmil", "clam_sb", "transmil", "dsmil", "asmil"])
def test_run__same_command_twice__gives_the_same_result_but_for_times(tmp_path, model):
    results = [
        _run(tmp_path / name, f"model={model}", "plugin=anchor_nsf", "hidden=16")
        for name in ("a", "b")
    ]

    assert _without_times(results[0]) == _without_times(results[1])
    assert (tmp_path / "a" / "predictions.csv").read_text() == (
        tmp_path / "b" / "predictions.csv"
    ).read_text()


def test_run__weight_0__equals_no_plugin(tmp_path):
    bare = _run(tmp_path / "bare")
    zero = _run(tmp_path / "zero", "plugin=anchor_nsf", "plugin.weight=0.0")

    # But for what it costs to measure.
    own = {"plugin", "cost/flops_step", "cost/peak_memory_mb"}
    assert {key for key, value in _without_times(zero).items() if value != bare[key]} == own


@pytest.mark.slow
def test_run__complete_folder__is_not_run_again_unless_asked(tmp_path):
    first = _run(tmp_path)
    again = _run(tmp_path)
    anew = _run(tmp_path, "resume=false")

    assert again == first
    assert anew != first  # its times at least
    assert _without_times(anew) == _without_times(first)


def test_run__folder_of_another_configuration__is_refused_and_left_alone(tmp_path):
    _run(tmp_path)
    before = (tmp_path / "metrics.json").read_text()

    with pytest.raises(ValueError, match=r"another configuration; these differ: \['module.lr'\]"):
        _run(tmp_path, "module.lr=0.1")

    assert (tmp_path / "metrics.json").read_text() == before


def test_run__folder_of_a_run_that_never_began__is_taken_over(tmp_path):
    with pytest.raises(Exception, match="lr must be"):
        _run(tmp_path, "module.lr=0.0")

    assert _run(tmp_path)["test/f1"] >= 0


def test_run__killed_between_fit_and_test__only_tests(tmp_path):
    first = _run(tmp_path)
    (tmp_path / "metrics.json").unlink()

    again = _run(tmp_path)

    assert _without_times(again) == _without_times(first)
    # The checkpoint keeps the time that training took; loading alone takes next to none.
    assert again["time/fit_s"] > first["time/fit_s"] / 3


@pytest.mark.slow
def test_run__killed_while_a_checkpoint_is_copied__goes_on_from_the_last_one(tmp_path, monkeypatch):
    tiny = ("data=musk1", "hidden=8", "maps=0")
    targets = []

    def copy(source, target):  # what a move becomes from one file system to another
        content = Path(source).read_bytes()
        targets.append(str(target))
        if sum("last.ckpt" in name for name in targets) == 2:
            Path(target).write_bytes(content[: len(content) // 2])
            raise OSError("killed")
        Path(target).write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr("fsspec.implementations.local.shutil.move", copy)
        with pytest.raises(OSError, match="killed"):
            _run(tmp_path / "killed", *tiny)

    resumed = _run(tmp_path / "killed", *tiny)

    assert _without_times(resumed) == _without_times(_run(tmp_path / "whole", *tiny))


def test_run__without_a_whole_epoch__says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"none was written with trainer\.max_epochs=0"):
        run(composed(QUIET, "trainer.max_epochs=0", folder=tmp_path))


@pytest.mark.parametrize("site", [(), ("site=model.scorer",)], ids=["found", "named"])
def test_run__third_party_model__runs_with_its_attention_found_or_named(tmp_path, site):
    metrics = _run(tmp_path, *_third_party(tmp_path, "MeanModel"), "plugin=anchor", *site)

    assert metrics["attention/jsd"] >= 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The scores of attention block")
def test_run__named_attention_killed_between_fit_and_test__is_not_looked_for(tmp_path, caplog):
    # The model has none that could be found.
    arguments = (*_third_party(tmp_path, "SigmoidModel"), "site=model.scorer")
    slides = ("data=synthetic", "data.size=tiny", "maps=0")
    folder = tmp_path / "run"
    _run(folder, *arguments, *slides)
    (folder / "metrics.json").unlink()
    caplog.clear()

    metrics = _run(folder, *arguments, *slides)

    assert "localization/dice" in metrics
    assert "No attention maps" not in caplog.text


def test_run__model_without_attention__runs_without_a_plugin_only(tmp_path):
    arguments = _third_party(tmp_path, "NoAttention")

    with pytest.warns(
        UserWarning, match=r"The attention of evaluated bags is not recorded: The attention of"
    ):
        metrics = _run(tmp_path / "bare", *arguments)
    assert "attention/jsd" not in metrics
    with pytest.raises(Exception, match=r"The attention of MILModule must be found, but no sub"):
        _run(tmp_path / "anchor", *arguments, "plugin=anchor")


def _third_party(folder, name):
    model = {"_target_": f"tests.third_party.{name}"}
    (folder / "conf/model").mkdir(parents=True)
    (folder / "conf/model/own.yaml").write_text(yaml.safe_dump(model))
    return "model=own", f"hydra.searchpath=[file://{folder / 'conf'}]"


def test_run__early_stopping__ends_before_the_last_epoch(tmp_path):
    _run(tmp_path, "early_stopping=1", "trainer.max_epochs=40")

    epochs = {row.epoch for row in read_attention(tmp_path / "attention.csv")}
    assert len(epochs) < 40


def test_run__slides_without_a_test_part__measures_validation(tmp_path):
    cohort = SyntheticCohort("camelyon_like", "tiny")
    write_cohort(cohort, tmp_path / "slides", progress=False)
    rows = (tmp_path / "slides" / "labels.csv").read_text().splitlines()[1:41]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["case_id,slide_id,label,split", *(f"{row},train" for row in rows)]))

    with pytest.warns(UserWarning, match="20 of 60 slides .* are in no row of the table"):
        metrics = _run(
            tmp_path / "run",
            "data=folder",
            f"data.root={tmp_path / 'slides'}",
            f"data.labels={table}",
            "data.val_fraction=0.3",
            "hidden=16",
        )

    assert metrics["val/f1"] >= 0
    assert not any(key.startswith(("test/", "localization/")) for key in metrics)
    assert not (tmp_path / "run" / "heatmaps").exists()


def test_run__slides_of_which_nothing_is_known__says_that_there_are_no_maps(tmp_path, caplog):
    (tmp_path / "pt_files").mkdir()
    rows = ["slide_id,label,split"]
    for index, part in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        torch.save(torch.randn(5 + index, 8), tmp_path / "pt_files" / f"s{index}.pt")
        rows.append(f"s{index},{index % 2},{part}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))

    metrics = _run(
        tmp_path / "run",
        "data=folder",
        f"data.root={tmp_path / 'pt_files'}",
        f"data.labels={tmp_path / 'labels.csv'}",
        "hidden=8",
    )

    assert metrics["test/f1"] >= 0
    assert "No attention maps: these slides have neither coordinates nor" in caplog.text


@pytest.mark.slow
def test_run__slides__keeps_maps_and_measures_localisation(tmp_path):
    metrics = _run(tmp_path, "data=synthetic", "data.size=tiny", "hidden=16", "maps=3")

    kept = {bag.bag_id: bag for bag in read_maps(tmp_path / "attention.h5")}
    with (tmp_path / "split.csv").open() as file:
        part_of = {row["slide_id"]: row for row in csv.DictReader(file)}
    evaluated = {name for name, row in part_of.items() if row["split"] != "train"}
    assert set(kept) == evaluated
    assert all(bag.has_best for bag in kept.values())
    followed = {name for name, bag in kept.items() if bag.epochs}
    assert len(followed) == 3
    assert all(kept[name].epochs == [0, 1] for name in followed)
    assert {part_of[name]["label"] for name in followed} == {"1"}
    assert len(list((tmp_path / "heatmaps").iterdir())) == 3

    # The specificity again, from the attention itself.
    shares = []
    for name, bag in kept.items():
        if bag.part == "test" and bag.label == 0:
            attention = read_map(tmp_path / "attention.h5", name).attention(None).double()
            middle = (attention.min() + attention.max()) / 2
            shares.append(float((attention <= middle).double().mean()))
    assert metrics["localization/specificity"] == pytest.approx(sum(shares) / len(shares))
    with (tmp_path / "localization.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["bag_id"] for row in rows} <= {n for n, bag in kept.items() if bag.part == "test"}


@pytest.mark.slow
def test_run__slides_killed_between_fit_and_test__measures_the_same(tmp_path):
    first = _run(tmp_path, "data=synthetic", "data.size=tiny", "hidden=16")
    for name in ("metrics.json", "localization.csv"):
        (tmp_path / name).unlink()

    again = _run(tmp_path, "data=synthetic", "data.size=tiny", "hidden=16")

    assert _without_times(again) == _without_times(first)
    assert "localization/froc" in again
    assert (tmp_path / "localization.csv").exists()


def test_run__no_maps_wanted__draws_and_follows_none_but_measures(tmp_path):
    metrics = _run(tmp_path, "data=synthetic", "data.size=tiny", "hidden=16", "maps=0")

    assert "localization/dice" in metrics
    assert not (tmp_path / "heatmaps").exists()
    assert not any(bag.epochs for bag in read_maps(tmp_path / "attention.h5"))


INTERRUPTED = ("plugin=anchor_nsf", "trainer.max_epochs=12", "data=musk1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    whole = _started(folder, *INTERRUPTED)
    output = whole.communicate(timeout=200)[0]
    assert whole.returncode == 0, output
    return read_runs(folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl_c", "kill_9"])
def test_run__interrupted__is_continued_by_the_same_command(tmp_path, uninterrupted, number):
    broken = _started(tmp_path, *INTERRUPTED)
    folder = tmp_path / "abmil/anchor_nsf/musk1/seed=0,fold=0,trainer.max_epochs=12"
    deadline = time.monotonic() + 100
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        assert broken.poll() is None
        time.sleep(0.02)
    os.kill(broken.pid, number)
    output = broken.communicate(timeout=100)[0]

    assert broken.returncode != 0
    assert not (folder / "metrics.json").exists()
    if number == signal.SIGINT:
        assert "The same command continues" in output
    again = _started(tmp_path, *INTERRUPTED)
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    assert "Continuing from" in output
    (run,) = read_runs(tmp_path)
    assert _without_times(run.metrics) == _without_times(uninterrupted.metrics)
    assert run.attention() == uninterrupted.attention()
    predictions = [(r.folder / "predictions.csv").read_text() for r in (run, uninterrupted)]
    assert predictions[0] == predictions[1]


@pytest.mark.slow
def test_run__sweep__gives_a_folder_for_each_job(tmp_path):
    sweep = _started(
        tmp_path, "-m", "model=abmil,dsmil", "plugin=none,anchor", "trainer.max_epochs=1"
    )
    output = sweep.communicate(timeout=200)[0]

    assert sweep.returncode == 0, output
    cells = {run.cell for run in read_runs(tmp_path)}
    assert cells == {("ucsb_breast", m, p) for m in ("abmil", "dsmil") for p in ("none", "anchor")}


@pytest.mark.slow
def test_run__two_processes__train_and_test_once(tmp_path):
    started = _started(
        tmp_path,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.max_epochs=2",
        "plugin=anchor_nsf",
        "model=clam_sb",
    )
    output = started.communicate(timeout=300)[0]

    assert started.returncode == 0, output
    (run,) = read_runs(tmp_path)
    with (run.folder / "predictions.csv").open() as file:
        ids = [row["bag_id"] for row in csv.DictReader(file)]
    assert len(ids) == len(set(ids)) == 17  # 11 validation and 6 test bags, each once
    rows = run.attention()
    assert len(rows) == len({(row.epoch, row.bag_id) for row in rows}) == 22
