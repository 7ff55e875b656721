import json

import pytest

from mil_anchor.callbacks.monitor import AttentionRow
from mil_anchor.results import attention_summary, by_cell, read_metrics, read_runs, read_unfinished
from tests.run_folders import write_run


def test_read_runs__folders_anywhere__are_read_once_and_sorted(tmp_path):
    write_run(tmp_path / "b", "none", f1=0.7)
    write_run(tmp_path / "a" / "deep", "anchor", f1=0.8)

    runs = read_runs(tmp_path / "b", tmp_path, tmp_path / "a")

    assert [run.metrics["plugin"] for run in runs] == ["anchor", "none"]
    assert runs[0].metrics["test/f1"] == 0.8
    assert runs[0].config["module.lr"] == "0.001"
    assert [cell[2] for cell in by_cell(runs)] == ["none", "anchor"]


def test_read_runs__progress__is_given_the_folders(tmp_path):
    folder = write_run(tmp_path, f1=0.7)
    seen = []

    read_runs(tmp_path, progress=lambda folders: seen.extend(folders) or folders)

    assert seen == [folder]


def test_read_runs__folder_without_runs__is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold complete runs, but there is no metrics\.json"):
        read_runs(tmp_path)


def test_read_runs__folder_that_is_not_there__is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere must be a folder of run folders"):
        read_runs(tmp_path / "nowhere")


def test_read_runs__weight_sweep__is_not_one_cell(tmp_path):
    for weight in (0.1, 0.3):
        for seed in (0, 1):
            write_run(tmp_path, "anchor_nsf", seed, settings={"plugin.weight": weight})
    write_run(tmp_path, "none")

    cells = by_cell(read_runs(tmp_path))

    assert {cell[2]: len(runs) for cell, runs in cells.items()} == {
        "none": 1,
        "anchor_nsf (plugin.weight=0.1)": 2,
        "anchor_nsf (plugin.weight=0.3)": 2,
    }


def test_read_runs__weights_of_different_seeds__are_told_apart_too(tmp_path):
    write_run(tmp_path, "anchor", 0, settings={"plugin.weight": 0.1})
    write_run(tmp_path, "anchor", 1, settings={"plugin.weight": 0.3})

    assert len(by_cell(read_runs(tmp_path))) == 2


def test_read_runs__incidental_differences__make_no_cells(tmp_path):
    for seed in range(3):
        incidental = {"out": str(seed), "threads": seed, "maps": seed, "trainer.devices": [seed]}
        write_run(tmp_path, "anchor", seed, fold=seed, settings=incidental)

    assert [cell[2] for cell in by_cell(read_runs(tmp_path))] == ["anchor"]


def test_read_runs__same_run_in_two_sweeps__is_not_counted_as_two_seeds(tmp_path):
    for out in ("a", "b"):
        write_run(tmp_path / out, "none", settings={"out": out}, f1=0.5)

    assert [cell[2] for cell in by_cell(read_runs(tmp_path))] == ["none (out=a)", "none (out=b)"]


def test_read_runs__copy_of_a_run__is_left_out(tmp_path):
    for place in ("original", "copy"):
        write_run(tmp_path / place, "none", f1=0.5)

    assert len(read_runs(tmp_path)) == 1


def test_read_runs__run_without_configuration__stands_apart(tmp_path):
    write_run(tmp_path, "none", 0)
    (write_run(tmp_path, "none", 1) / "config.yaml").unlink()

    assert [cell[2] for cell in by_cell(read_runs(tmp_path))] == ["none", "none (no config.yaml)"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"model": "ab', "must hold a JSON object, but it is cut off"),
        ("[1, 2]", "must hold a JSON object, but a list came"),
        ('{"accuracy": 1}', "is not of a run"),
    ],
)
def test_read_runs__broken_metrics__are_a_row_of_the_unfinished(tmp_path, text, reason):
    write_run(tmp_path, "none")
    broken = write_run(tmp_path, "anchor", 3)
    (broken / "metrics.json").write_text(text)

    (run,) = read_runs(tmp_path)
    (unfinished,) = read_unfinished(tmp_path)

    assert run.metrics["plugin"] == "none"
    assert (unfinished.plugin, unfinished.seed, unfinished.folder) == ("anchor", 3, broken)
    assert reason in unfinished.reason


def test_read_metrics__cut_off_file__is_named(tmp_path):
    (tmp_path / "metrics.json").write_text("{")

    with pytest.raises(ValueError, match=r"metrics\.json must hold a JSON object, but it is cut"):
        read_metrics(tmp_path)


def test_read_unfinished__failed_and_interrupted__say_why(tmp_path):
    failed = write_run(tmp_path, "anchor", 1, fold=2, complete=False)
    (failed / "error.txt").write_text("Traceback ...\n  line\nValueError: too small\n\n")
    write_run(tmp_path, "none", complete=False)
    (tmp_path / "empty").mkdir()

    found = read_unfinished(tmp_path)

    assert [(*row[1:6], row.reason) for row in found] == [
        ("abmil", "anchor", "musk1", 1, 2, "ValueError: too small"),
        ("abmil", "none", "musk1", 0, 0, "interrupted, or still running"),
    ]


def test_read_unfinished__failed_before_its_configuration__is_named_by_its_folder(tmp_path):
    folder = tmp_path / "abmil" / "anchor" / "musk1" / "seed=4,fold=2,plugin.weight=9"
    folder.mkdir(parents=True)
    (folder / "error.txt").write_text("RuntimeError: no")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "error.txt").write_text("")

    first, second = read_unfinished(tmp_path)

    assert first[1:6] == ("abmil", "anchor", "musk1", 4, 2)
    assert second[1:] == ("?", "?", "?", None, None, "failed", None)


def test_read_unfinished__complete_runs_and_files_of_other_programs__are_none(tmp_path):
    folder = write_run(tmp_path, f1=0.5)
    for name in (".hydra", "wandb"):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(
            "names: {model: a}" if name == ".hydra" else "a: 1"
        )
    (folder / "wandb" / "deeper").mkdir()
    (folder / "wandb" / "deeper" / "config.yaml").write_text("{")

    assert read_unfinished(tmp_path) == []


def test_read_runs__sweep_repeated_elsewhere__counts_no_seed_twice(tmp_path, caplog):
    for machine, seconds in (("laptop", 1.0), ("server", 2.0)):
        for seed in (0, 1):
            write_run(tmp_path / machine, "none", seed, f1=0.7, time__epoch_s=seconds)
    write_run(tmp_path / "server", "none", 1, settings={"maps": 4}, f1=0.7, dice=0.1, loss=0.5)

    runs = read_runs(tmp_path)

    assert {cell: [run.draw for run in own] for cell, own in by_cell(runs).items()} == {
        ("musk1", "abmil", "none"): [(0, 0), (1, 0)]
    }
    assert "test/dice" in runs[1].metrics
    assert "3 run(s) left out, which repeat others" in caplog.text


def test_read_runs__undefined_metrics__are_left_out(tmp_path):
    write_run(tmp_path, f1=0.7, auroc=float("nan"), loss=float("inf"), accuracy=None)

    (run,) = read_runs(tmp_path)

    assert [key for key in run.metrics if key.startswith("test/")] == ["test/f1"]


def test_read_unfinished__metrics_without_a_seed__are_not_of_a_run(tmp_path):
    folder = write_run(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "seed": None}))

    (found,) = read_unfinished(tmp_path)

    assert found.reason == "its metrics.json is not of a run: ['seed'] are not in it"


@pytest.mark.parametrize("text", ["names: {0: cat}", "names: {model: a, plugin: b, data: c}"])
def test_read_unfinished__names_of_another_program__are_no_run(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)

    assert read_unfinished(tmp_path) == []


def _row(epoch, bag_id, jsd=None, *, entropy=0.5, correlation=None, auroc=None):
    return AttentionRow(epoch, bag_id, "online", jsd, correlation, entropy, 0.1, 0.2, auroc)


def test_attention_summary__rows__is_mean_jsd_and_the_other_measures_of_the_last_epoch():
    rows = [
        _row(0, "a", entropy=0.9, auroc=0.1),
        _row(1, "a", 0.2, entropy=0.6, correlation=0.5, auroc=0.7),
        _row(1, "b", 0.4, entropy=0.8, correlation=0.7),
    ]

    of_last = {"attention/top1pct": 0.1, "attention/top10": 0.2}
    assert attention_summary(rows) == pytest.approx(
        {
            "attention/jsd": 0.3,
            "attention/jsd_last_third": 0.3,
            "attention/rank_correlation": 0.6,
            "attention/entropy": 0.7,
            "attention/auroc": 0.7,
            **of_last,
        }
    )
    assert attention_summary(rows[:1]) == {
        "attention/entropy": 0.9,
        "attention/auroc": 0.1,
        **of_last,
    }
    assert attention_summary([]) == {}


@pytest.mark.parametrize(("n_epochs", "first"), [(3, 2), (4, 2), (5, 3), (50, 33)])
def test_attention_summary__thirds__are_rounded_to_whole_epochs(n_epochs, first):
    rows = [_row(epoch, "a", epoch if epoch else None) for epoch in range(n_epochs)]

    summary = attention_summary(rows)

    late = sum(range(first, n_epochs)) / (n_epochs - first)
    assert summary["attention/jsd_last_third"] == pytest.approx(late)
    # The first epoch has none before it.
    early = sum(range(1, first)) / (first - 1)
    assert summary["attention/jsd_first_two_thirds"] == pytest.approx(early)
