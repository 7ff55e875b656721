import json
import os
import shutil
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger

import mil_anchor.loggers
from mil_anchor.experiment import run
from mil_anchor.loggers import log_result, opened_loggers
from mil_anchor.module import MILModule
from mil_anchor.results import read_runs
from tests.composing import ROOT, composed

METRICS = {"model": "abmil", "plugin": "none", "data": "musk1", "seed": 0, "test/f1": 0.75}
ATTENTION = """\
epoch,bag_id,weights,jsd,rank_correlation,entropy,top1pct,top10,auroc,mixing_correlation
0,a,online,,,0.9,0.1,0.5,,
1,a,online,0.002,0.9,0.8,0.1,0.5,,
"""
QUICK = ("data=musk1", "trainer.max_epochs=2", "trainer.enable_progress_bar=false")


def _composed(folder, *overrides):
    return composed(f"out={folder}", *QUICK, *overrides, folder=folder / "run")


def _opened(config, folder):
    (folder / "run").mkdir(exist_ok=True)
    return opened_loggers(config, folder / "run", settings={"lr": 1e-4, "model": {"width": 3}})


def _begin(folder):
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "run" / "checkpoints" / "last.ckpt").touch()


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "logs" / "tensorboard"))
    events.Reload()
    return events


def _client(folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def _crash_after_the_fit(config, folder):
    def fit():
        with _opened(config, folder) as loggers:
            loggers[1].finalize("success")  # as Lightning does at the end of the fit
            _begin(folder)
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fit()


def _mlflow_runs(folder):
    client = _client(folder)
    experiment = client.get_experiment_by_name(str(folder))
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def _wandb_records(folder):
    """The records of every offline run below a folder, by the name of its folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    of_runs = {}
    for file in sorted(folder.rglob("*.wandb")):
        of_runs[file.parent.name] = [Record.FromString(r) for r in _leveldb_log(file.read_bytes())]
    return of_runs


def _leveldb_log(content):
    """The records of LevelDB's log format, in which W&B keeps a run, behind a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # the end of a block, too short for a chunk
            place += left
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]  # 1: whole, 2: first, 3: middle, 4: last
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def _summary_of(records):
    updates = [item for r in records if r.HasField("summary") for item in r.summary.update]
    return {item.key: json.loads(item.value_json) for item in updates if item.key}


def _exit_codes(records):
    return [record.exit.exit_code for record in records if record.HasField("exit")]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    _client(folder).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def mlflow_tables(tmp_path, empty_store):
    # MLflow takes seconds to make them.
    shutil.copy(empty_store, tmp_path / "mlflow.db")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("csv", ["csv"]),
        ("tensorboard", ["csv", "tensorboard"]),
        ("[tensorboard,wandb]", ["csv", "tensorboard", "wandb"]),
        ("[mlflow,wandb]", ["csv", "mlflow", "wandb"]),
    ],
)
def test_conf__loggers__always_have_the_csv_file(tmp_path, name, kinds):
    assert list(_composed(tmp_path, f"logger={name}").logger) == kinds


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_opened_loggers__package_missing__says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setattr(mil_anchor.loggers, "find_spec", lambda package: None)

    with (
        pytest.raises(ModuleNotFoundError, match=rf"logger={name} .* 'mil_anchor\[{name}\]'"),
        _opened(_composed(tmp_path, f"logger={name}"), tmp_path),
    ):
        pass

    assert not any((tmp_path / "run").iterdir())


def test_opened_loggers__of_the_users_own__is_finished(tmp_path, monkeypatch):
    statuses = []
    monkeypatch.setattr(CSVLogger, "finalize", lambda self, status: statuses.append(status))
    config = _composed(tmp_path)

    with _opened(config, tmp_path):
        pass
    with pytest.raises(RuntimeError, match="crash"), _opened(config, tmp_path):
        raise RuntimeError("crash")

    assert statuses == ["success", "failed"]


def test_run__tensorboard__has_curves_images_and_hyperparameters(tmp_path):
    metrics = run(_composed(tmp_path, "logger=tensorboard", "plugin=anchor"))

    events = _events(tmp_path)
    n_steps = 2 * 66  # two epochs
    assert [event.step for event in events.Scalars("anchor/kl")] == [n_steps // 2 - 1, n_steps - 1]
    assert events.Scalars("test/f1")[-1].value == pytest.approx(metrics["test/f1"])
    assert events.Scalars("cost/flops_step")[-1].value == pytest.approx(metrics["cost/flops_step"])
    assert set(events.Tags()["images"]) == {"attention/jsd", "attention/concentration"}
    (image,) = events.Images("attention/jsd")
    assert image.width > image.height > 100
    assert image.step == n_steps
    settings = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"plugin/weight" in settings


def test_log_result__heat_maps__are_logged_with_the_figures(tmp_path):
    (tmp_path / "run" / "heatmaps").mkdir(parents=True)
    (tmp_path / "run" / "attention.csv").write_text(ATTENTION)
    drawn = np.zeros((12, 20, 3), np.uint8)
    drawn[:, :5] = (255, 0, 51)
    matplotlib.image.imsave(tmp_path / "run" / "heatmaps" / "slide_1.png", drawn)

    with _opened(_composed(tmp_path, "logger=tensorboard"), tmp_path) as loggers:
        log_result(loggers, tmp_path / "run", METRICS, step=7)

    events = _events(tmp_path)
    names = {"attention/jsd", "attention/concentration", "heatmaps/slide_1"}
    assert set(events.Tags()["images"]) == names
    (image,) = events.Images("heatmaps/slide_1")
    file = tmp_path / "again.png"
    file.write_bytes(image.encoded_image_string)
    assert np.array_equal((matplotlib.image.imread(file)[..., :3] * 255).round(), drawn)


def test_log_result__without_matplotlib__logs_the_metrics_alone(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attention.csv").write_text(ATTENTION)
    with _opened(_composed(tmp_path, "logger=tensorboard"), tmp_path) as loggers:
        monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
        log_result(loggers, tmp_path / "run", METRICS, step=7)
        monkeypatch.undo()

    events = _events(tmp_path)
    assert events.Tags()["images"] == []
    assert events.Scalars("test/f1")[-1].value == 0.75


def test_log_result__one_epoch__has_no_jsd_to_draw(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attention.csv").write_text("\n".join(ATTENTION.splitlines()[:2]))

    with _opened(_composed(tmp_path, "logger=tensorboard"), tmp_path) as loggers:
        log_result(loggers, tmp_path / "run", METRICS, step=7)

    assert _events(tmp_path).Tags()["images"] == ["attention/concentration"]


def test_opened_loggers__mlflow__is_a_run_with_all_that_is_known(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attention.csv").write_text(ATTENTION)
    with _opened(_composed(tmp_path, "logger=mlflow"), tmp_path) as loggers:
        loggers[1].log_metrics({"val/f1": 0.5}, 3)
        assert _mlflow_runs(tmp_path)[0].info.status == "RUNNING"
        log_result(loggers, tmp_path / "run", METRICS, step=7)

    (found,) = _mlflow_runs(tmp_path)
    assert found.info.status == "FINISHED"
    assert found.info.run_name.startswith("abmil/none/musk1/seed=0,fold=0")
    assert found.data.params == {"lr": "0.0001", "model/width": "3"}
    assert found.data.metrics == {"val/f1": 0.5, "test/f1": 0.75, "seed": 0}
    assert found.data.tags.items() >= {"model": "abmil", "plugin": "none"}.items()
    client = _client(tmp_path)
    assert client.get_metric_history(found.info.run_id, "test/f1")[0].step == 7
    artifacts = {file.path for file in client.list_artifacts(found.info.run_id, "attention")}
    assert artifacts == {"attention/jsd.png", "attention/concentration.png"}
    assert (tmp_path / "mlflow" / found.info.run_id).is_dir()


def test_opened_loggers__crash_after_a_finished_stage__has_failed_and_can_go_on(
    tmp_path, mlflow_tables
):
    config = _composed(tmp_path, "logger=mlflow")
    _crash_after_the_fit(config, tmp_path)
    (failed,) = _mlflow_runs(tmp_path)
    assert failed.info.status == "FAILED"

    settings = {"lr": 1e-4, "threads": 2}  # threads may differ
    with opened_loggers(config, tmp_path / "run", settings=settings) as loggers:
        (continued,) = _mlflow_runs(tmp_path)
        assert continued.info.status == "RUNNING"
        loggers[1].log_metrics({"val/f1": 0.5}, 3)

    (finished,) = _mlflow_runs(tmp_path)
    assert finished.info.run_id == failed.info.run_id
    assert finished.info.status == "FINISHED"
    assert finished.data.metrics == {"val/f1": 0.5}
    assert finished.data.params == failed.data.params


def test_opened_loggers__killed_before_a_checkpoint__is_another_run(tmp_path, mlflow_tables):
    config = _composed(tmp_path, "logger=mlflow")
    with _opened(config, tmp_path):
        pass
    (killed,) = _mlflow_runs(tmp_path)
    _client(tmp_path).update_run(killed.info.run_id, status="RUNNING")

    with _opened(config, tmp_path):
        pass

    assert [found.info.status for found in _mlflow_runs(tmp_path)] == ["KILLED", "FINISHED"]


def test_opened_loggers__store_is_gone__begins_another_run(tmp_path, mlflow_tables):
    config = _composed(tmp_path, "logger=mlflow")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loggers.json").write_text(json.dumps({"mlflow": "0" * 32}))
    _begin(tmp_path)

    with _opened(config, tmp_path):
        pass

    (found,) = _mlflow_runs(tmp_path)
    assert found.info.status == "FINISHED"
    assert json.loads((tmp_path / "run" / "loggers.json").read_text()) == {
        "mlflow": found.info.run_id
    }


@pytest.mark.slow
def test_opened_loggers__processes_at_once__share_one_new_store(tmp_path):
    script = f"""
import sys
from pathlib import Path
from tests.test_loggers import _composed, _opened
folder = Path({str(tmp_path)!r})
own = folder / sys.argv[1]
own.mkdir()
config = _composed(folder, "logger=mlflow")
from mil_anchor.loggers import opened_loggers
with opened_loggers(config, own, settings={{"seed": sys.argv[1]}}) as loggers:
    for step in range(100):
        loggers[1].log_metrics({{"val/f1": step / 100}}, step)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(index)], cwd=ROOT) for index in range(4)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * 4

    runs = _mlflow_runs(tmp_path)
    assert sorted(found.data.params["seed"] for found in runs) == list("0123")
    assert {found.info.status for found in runs} == {"FINISHED"}
    client = _client(tmp_path)
    assert all(len(client.get_metric_history(r.info.run_id, "val/f1")) == 100 for r in runs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["training_step", "test_step"])
def test_run__crash_in_a_stage__fails_in_mlflow_and_goes_on_there(tmp_path, monkeypatch, stage):
    config = _composed(tmp_path, "logger=mlflow")
    original = getattr(MILModule, stage)

    def crash(module, batch, batch_idx):
        if stage == "test_step" or module.current_epoch == 1:
            raise RuntimeError("crash")
        return original(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MILModule, stage, crash)
        with pytest.raises(RuntimeError, match="crash"):
            run(config)
    (failed,) = _mlflow_runs(tmp_path)
    assert failed.info.status == "FAILED"

    metrics = run(config)

    (finished,) = _mlflow_runs(tmp_path)
    assert finished.info.status == "FINISHED"
    assert finished.data.metrics["test/f1"] == pytest.approx(metrics["test/f1"])
    assert finished.data.tags["model"] == "abmil"
    assert finished.data.params["module/lr"] == str(config.module.lr)


@pytest.mark.slow
def test_run__killed__goes_on_in_its_loggers_runs(tmp_path):
    arguments = ["data=musk1", "trainer.max_epochs=12", "trainer.enable_progress_bar=false"]
    loggers = ["logger=[mlflow,wandb]", "logger.wandb.offline=true"]
    command = [sys.executable, "run.py", *arguments, *loggers, f"out={tmp_path}"]
    broken = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("last.ckpt")):
        assert time.monotonic() < deadline
        assert broken.poll() is None
        time.sleep(0.02)
    os.kill(broken.pid, signal.SIGKILL)
    broken.wait(timeout=100)
    (killed,) = _mlflow_runs(tmp_path)
    assert killed.info.status == "RUNNING"

    again = subprocess.run(command, cwd=ROOT, timeout=200, capture_output=True, text=True)

    assert again.returncode == 0, again.stderr
    (finished,) = _mlflow_runs(tmp_path)
    assert finished.info.run_id == killed.info.run_id
    assert finished.info.status == "FINISHED"
    steps = [p.step for p in _client(tmp_path).get_metric_history(finished.info.run_id, "val/f1")]
    assert len(set(steps)) >= 12
    of_runs = _wandb_records(tmp_path)
    assert len({name.rpartition("-")[2] for name in of_runs}) == 1
    assert [_exit_codes(records) for records in of_runs.values()] == [[], [0]]


@pytest.mark.slow
def test_run__sweep_of_two_at_once__is_a_run_for_each_job(tmp_path):
    arguments = ["data=musk1", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    loggers = ["logger=[mlflow,wandb]", "logger.wandb.offline=true"]
    command = [sys.executable, "run.py", "-m", "seed=0,1", *arguments, *loggers, f"out={tmp_path}"]
    sweep = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)

    assert sweep.returncode == 0, sweep.stderr
    of_seeds = {found.metrics["seed"]: found.metrics for found in read_runs(tmp_path)}
    runs = _mlflow_runs(tmp_path)
    assert {found.data.params["seed"] for found in runs} == {"0", "1"}
    for found in runs:
        assert found.info.status == "FINISHED"
        f1 = of_seeds[int(found.data.params["seed"])]["test/f1"]
        assert found.data.metrics["test/f1"] == pytest.approx(f1)
    summaries = [_summary_of(records) for records in _wandb_records(tmp_path).values()]
    assert sorted(summary["seed"] for summary in summaries) == [0, 1]


@pytest.mark.slow
def test_run__wandb_offline__is_a_run_for_each_job_of_a_process(tmp_path, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    options = ("logger=wandb", "logger.wandb.offline=true", "plugin=anchor", "trainer.max_epochs=2")
    results = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        config = composed(f"out={tmp_path}", *QUICK, *options, f"seed={seed}", folder=folder)
        results[seed] = run(config)
        assert wandb.run is None
        assert "WANDB_MODE" not in os.environ

    of_runs = _wandb_records(tmp_path)
    assert len({name.rpartition("-")[2] for name in of_runs}) == 2
    for records in of_runs.values():
        (begun,) = [record.run for record in records if record.HasField("run")][:1]
        assert begun.run_group == str(tmp_path)
        assert begun.project == "mil_anchor"
        settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
        summary = _summary_of(records)
        seed = summary["seed"]
        assert f"/seed={seed}," in begun.display_name
        assert summary["test/f1"] == results[seed]["test/f1"]
        assert summary["plugin"] == "anchor"
        assert _exit_codes(records) == [0]
        settings |= {
            item.key: json.loads(item.value_json)
            for record in records
            if record.HasField("config")
            for item in record.config.update
        }
        assert settings["seed"] == seed
    assert len(list(tmp_path.rglob("jsd*.png"))) == 2


@pytest.mark.slow
def test_run__crash_with_wandb__has_failed_there_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    config = _composed(tmp_path, "logger=wandb", "logger.wandb.offline=true")

    def crash(module, batch, batch_idx):
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(MILModule, "test_step", crash)
        with pytest.raises(RuntimeError, match="crash"):
            run(config)
    run(config)

    of_runs = _wandb_records(tmp_path)
    assert [_exit_codes(records) for records in of_runs.values()] == [[1], [0]]
    assert len({name.rpartition("-")[2] for name in of_runs}) == 1
