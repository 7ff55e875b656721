"""The command line, on a cohort that it has written itself."""

import json
import re
import shlex
import sys

import pytest

from mil_anchor.__main__ import main
from mil_anchor.data.labels import read_labels
from mil_anchor.data.split_files import read_split
from mil_anchor.data.stores import open_store
from mil_anchor.experiment import run
from tests.composing import composed
from tests.run_folders import write_run


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "slides"
    assert main(["synthesize", str(folder), "--size", "tiny", "--preset", "bracs_like"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(
        composed(
            "data=folder",
            f"data.root={cohort}",
            f"data.labels={cohort / 'labels.csv'}",
            f"data.splits={cohort}",
            "data.mpp=0.5",
            "data.classes=[benign,atypical,malignant]",
            "hidden=16",
            "maps=2",
            "trainer.max_epochs=3",
            "trainer.enable_progress_bar=false",
            folder=folder,
        )
    )
    return folder


def test_synthesize__again__writes_nothing_anew_and_says_how_to_train(cohort, capsys):
    slide = next((cohort / "h5_files").iterdir())
    before = slide.stat().st_mtime_ns

    assert main(["synthesize", str(cohort), "--size", "tiny", "--preset", "bracs_like"]) == 0

    assert slide.stat().st_mtime_ns == before
    said = capsys.readouterr().out
    assert (
        f"python run.py data=folder data.root={cohort} data.labels={cohort / 'labels.csv'}" in said
    )


def test_synthesize__folder_of_something_else__is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")

    assert main(["synthesize", str(tmp_path), "--size", "tiny"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_inspect_data__sound_store__prints_counts_and_exits_with_0(cohort, capsys):
    assert main(["inspect-data", str(cohort), str(cohort / "labels.csv")]) == 0

    said = capsys.readouterr().out
    assert re.search(r"slides\D*60", said)
    assert "malignant" in said


def test_inspect_data__slides_missing_and_broken__lists_them_and_exits_with_1(
    cohort, tmp_path, capsys
):
    table = tmp_path / "labels.csv"
    table.write_text((cohort / "labels.csv").read_text() + "p,gone,benign\n")

    assert main(["inspect-data", str(cohort), str(table)]) == 1
    assert "gone" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect-data", "repack"])
def test_command__path_that_is_not_there__names_it(tmp_path, command, capsys):
    gone = tmp_path / "nowhere"
    arguments = [str(tmp_path / "out.h5")] if command == "repack" else []

    assert main([command, str(gone), *arguments]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_repack__then_inspect__agrees_with_the_source(cohort, tmp_path, capsys):
    packed = tmp_path / "features.h5"

    assert main(["repack", str(cohort), str(packed), "--dtype", "float32"]) == 0
    assert "60 slides" in capsys.readouterr().out
    source, again = open_store(cohort), open_store(packed)
    assert again.slide_ids == source.slide_ids
    for slide_id in source.slide_ids[:5]:
        one, other = source.read(slide_id), again.read(slide_id)
        assert one.features.equal(other.features)
        assert one.lesion.equal(other.lesion)
    assert main(["inspect-data", str(packed), str(cohort / "labels.csv")]) == 0


@pytest.mark.parametrize("layout", ["plain", "clam"])
def test_split__table__writes_folds_that_can_be_read(cohort, tmp_path, layout, capsys):
    labels = cohort / "labels.csv"
    arguments = ["--folds", "3", "--val-fraction", "0.2", "--layout", layout, "--seed", "4"]

    assert main(["split", str(labels), str(tmp_path), *arguments]) == 0

    assert capsys.readouterr().out.count("Wrote") == 3
    table = read_labels(labels)
    tested = []
    for fold in range(3):
        tested += read_split(tmp_path, table, fold=fold, val_fraction=0.5, seed=0).test
    assert sorted(tested) == list(range(60))


def test_split__help__says_what_folds_and_layouts_are(capsys):
    with pytest.raises(SystemExit):
        main(["split", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "a table with a column split has one" in said
    assert "clam: splits_<fold>.csv" in said


def test_split__folder_with_folds_of_another_draw__names_them(cohort, tmp_path, capsys):
    arguments = ["split", str(cohort / "labels.csv"), str(tmp_path), "--val-fraction", "0.2"]
    assert main([*arguments, "--folds", "4"]) == 0
    assert main([*arguments, "--folds", "3"]) == 1
    assert "['fold_3.csv'] are of another" in " ".join(capsys.readouterr().err.split())


def test_split__more_folds_than_slides_of_a_class__is_refused(cohort, tmp_path, capsys):
    assert main(["split", str(cohort / "labels.csv"), str(tmp_path), "--folds", "50"]) == 1
    assert "50 folds" in capsys.readouterr().err


@pytest.mark.slow
def test_heatmap__run_on_a_written_cohort__draws_best_and_epochs(trained, tmp_path, capsys):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"localization/dice", "localization/specificity", "localization/froc"} <= set(metrics)
    assert len(list((trained / "heatmaps").glob("*.png"))) == 2
    header, *rows = (trained / "split.csv").read_text().splitlines()
    assert header == "slide_id,label,split"
    val = [row.split(",")[0] for row in rows if row.endswith("val")]
    highest = max(rows, key=lambda row: (row.endswith("val"), row.split(",")[1])).split(",")[0]
    assert highest in val
    sheet = tmp_path / "sheet.png"

    arguments = ["--slide", highest, "--epochs", "0,2", "--scale", "log", "--out", str(sheet)]
    assert main(["heatmap", str(trained), *arguments, "--geojson"]) == 0

    said = capsys.readouterr().out
    assert sheet.exists()
    assert said.count(".geojson") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slide", "nobody"], "'nobody' came"),
        (["--slide", "TEST", "--epochs", "1"], "epoch 1"),
    ],
)
def test_heatmap__slide_or_epoch_that_is_not_kept__lists_what_is(
    trained, arguments, message, capsys
):
    rows = (trained / "split.csv").read_text().splitlines()
    tested = next(row.split(",")[0] for row in rows if row.endswith("test"))
    own = [tested if argument == "TEST" else argument for argument in arguments]

    assert main(["heatmap", str(trained), *own]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_heatmap__size_of_a_pixel_of_zero__is_refused(trained, capsys):
    slide = next((trained / "heatmaps").glob("*.png")).stem
    assert main(["heatmap", str(trained), "--slide", slide, "--mpp", "0"]) == 1
    assert "mpp must be a number above 0, but 0.0 came" in capsys.readouterr().err


def test_heatmap__folder_that_is_no_run__says_so(tmp_path, capsys):
    assert main(["heatmap", str(tmp_path), "--slide", "s"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("epochs", ["one", "1;2", ""])
def test_heatmap__epochs_that_are_no_numbers__are_refused(tmp_path, epochs, capsys):
    with pytest.raises(SystemExit):
        main(["heatmap", str(tmp_path), "--slide", "s", "--epochs", epochs])
    assert "--epochs" in capsys.readouterr().err


def test_synthesize__path_with_a_space__prints_a_command_that_a_shell_reads(tmp_path, capsys):
    folder = tmp_path / "my slides"
    assert main(["synthesize", str(folder), "--size", "tiny", "--layout", "packed"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert f"data.root={folder / 'features.h5'}" in command
    assert "data.classes=[negative,positive]" in command


def test_figures__run_on_slides__draws_what_it_has_data_for(trained, tmp_path, capsys):
    assert main(["figures", str(trained), "--out", str(tmp_path)]) == 0

    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {
        f"{name}.{suffix}"
        for name in ("jsd", "concentration", "targets", "reliability")
        for suffix in ("png", "svg")
    }
    said = capsys.readouterr().out
    assert "No tsne: " in said
    assert "bag_features=true" in said


@pytest.fixture
def measured(tmp_path):
    root = tmp_path / "runs"
    for seed in range(2):
        write_run(root, "none", seed, f1=0.5)
        write_run(root, "anchor_nsf", seed, f1=0.75)
    write_run(root, "slow", complete=False)
    return root


def test_report__runs__prints_and_writes_all_forms(measured, capsys):
    assert main(["report", str(measured)]) == 0

    said = capsys.readouterr().out
    assert re.search(r"abmil +anchor_nsf +F1 +2 +\+\.250", said)
    assert re.search(r"abmil +slow +0 +0 +interrupted", said)
    assert max(map(len, said.split("Wrote")[0].splitlines())) <= 80
    assert "## Differences to plugin=none" in (measured / "results.md").read_text()
    written = {file.name for file in (measured / "tables").iterdir()}
    assert {"results.csv", "differences.tex", "missing.csv", "reproduction.csv"} <= written
    assert "anchor_nsf" in (measured / "report.html").read_text()


def test_report__several_roots__go_into_one_folder(measured, tmp_path, capsys):
    write_run(tmp_path / "more", "anchor", f1=0.6)

    assert main(["report", str(measured), str(tmp_path / "more")]) == 0
    assert (tmp_path / "results.md").exists()
    out = tmp_path / "elsewhere"
    assert main(["report", str(measured), str(measured), "--out", str(out)]) == 0
    assert (out / "report.html").exists()
    assert not (measured / "results.md").exists()
    assert f"Wrote {out / 'results.md'}" in capsys.readouterr().out


def test_report__without_plotly__writes_all_else(measured, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mil_anchor.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)

    assert main(["report", str(measured)]) == 0

    assert "No report.html: " in (said := capsys.readouterr().out)
    assert "pip install 'mil_anchor[report]'" in said
    assert (measured / "results.md").exists()
    assert not (measured / "report.html").exists()


def test_report__cut_off_metrics__do_not_stop_it(measured, capsys):
    (write_run(measured, "broken", 5) / "metrics.json").write_text('{"model": "abm')

    assert main(["report", str(measured)]) == 0
    assert "cut off" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("folder", "message"), [("runs/none", "must be a folder"), (".", "must hold complete runs")]
)
def test_report__no_runs__says_so_and_exits_with_1(tmp_path, folder, message, capsys):
    assert main(["report", str(tmp_path / folder)]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
