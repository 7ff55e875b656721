import gc
import json
import weakref

import lightning.pytorch
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only

from mil_anchor.experiment import run
from mil_anchor.sweep import task as task_module
from mil_anchor.sweep.jobs import State, SweepTable
from mil_anchor.sweep.task import objective, task
from tests.composing import composed
from tests.sweep.jobs_of_sweeps import TINY, composed_job


def _without_times(metrics):
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}


def _metrics():
    (file,) = SweepTable(_out()).file.parent.rglob("metrics.json")
    return json.loads(file.read_text())


def _out():
    return SweepTable(task_module.Path(HydraConfig.get().sweep.dir)).file.parent


def test_objective__of_metrics__is_the_score_that_chose_the_checkpoint():
    assert objective({"val/selection": 1.25, "val/score": 1.3, "test/auroc": 0.9}) == 1.25
    assert objective({"test/auroc": 0.9}) is None


def test_task__single_run__gives_its_objective_and_leaves_errors_as_they_are(tmp_path):
    result = task(composed(*TINY, f"out={tmp_path}", folder=tmp_path / "run"))

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result == metrics["val/selection"]
    assert metrics["val/selection"] == pytest.approx(metrics["val/score"], abs=1e-4)
    with pytest.raises(ValueError, match=r"'data\.fold' must be a whole number, but got 'x'"):
        task(composed(*TINY, "data.fold=x", f"out={tmp_path}", folder=tmp_path / "wrong"))
    assert not SweepTable(tmp_path).file.exists()


@pytest.mark.slow
def test_task__job_twice__is_done_then_skipped(tmp_path):
    first = task(composed_job(tmp_path))
    (done,) = SweepTable(tmp_path).jobs()
    metrics = _metrics()
    again = task(composed_job(tmp_path))
    (skipped,) = SweepTable(tmp_path).jobs()

    assert first == again == metrics["val/selection"]
    assert _metrics() == metrics  # its times, too
    assert (done.state, skipped.state) == (State.DONE, State.SKIPPED)
    assert done.seconds > 0
    assert done.folder == str(HydraConfig.get().sweep.subdir)
    task(composed_job(tmp_path, "resume=false"))
    assert [job.state for job in SweepTable(tmp_path).jobs()] == [State.DONE]
    assert _metrics() != metrics


@pytest.mark.parametrize("resume", ["true", "false"])
def test_task__other_configuration_in_the_folder_of_another_job__is_refused(tmp_path, resume):
    of_sweep = ("hydra.callbacks.sweep.started=now", f"resume={resume}")
    task(composed_job(tmp_path, *of_sweep))
    metrics = _metrics()

    with pytest.raises(ValueError, match=r"another one runs in .* differ: \['data.root'\]"):
        task(composed_job(tmp_path, *of_sweep, "+data.root=elsewhere"))

    done, refused = SweepTable(tmp_path).jobs()
    assert (done.state, refused.state) == (State.DONE, State.FAILED)
    assert "+data.root=elsewhere" in refused.folder
    assert _metrics() == metrics


def test_task__job_inside_its_folder__has_its_row_in_that_of_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(task_module, "run", lambda config: {"val/selection": 0.5})
    monkeypatch.chdir(tmp_path)
    config = composed_job(task_module.Path("out"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as hydra.job.chdir=true does

    task(config)

    assert [job.state for job in SweepTable(tmp_path / "out").jobs()] == [State.DONE]


def test_task__failing_job__has_its_error_in_one_line_and_raises(tmp_path):
    with pytest.raises(Exception, match="lr must be"):
        task(composed_job(tmp_path, "module.lr=0.0"))

    (job,) = SweepTable(tmp_path).jobs()
    assert job.state is State.FAILED
    assert "lr must be" in job.error
    assert "\n" not in job.error
    assert "Traceback" in (tmp_path / job.folder / "error.txt").read_text()


def test_task__folder_of_another_configuration__fails(tmp_path):
    task(composed_job(tmp_path))
    file = tmp_path / SweepTable(tmp_path).jobs()[0].folder / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.001", "lr: 0.5"))

    with pytest.raises(ValueError, match=r"another configuration; these differ: \['module\.lr'\]"):
        task(composed_job(tmp_path))

    (job,) = SweepTable(tmp_path).jobs()
    assert job.state is State.FAILED


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_task__stopped_job__is_interrupted_and_stops_the_sweep(tmp_path, monkeypatch, error):
    def stopped(config):
        assert [job.state for job in SweepTable(tmp_path).jobs()] == [State.RUNNING]
        raise error

    monkeypatch.setattr(task_module, "run", stopped)

    with pytest.raises(error):
        task(composed_job(tmp_path))

    assert [job.state for job in SweepTable(tmp_path).jobs()] == [State.INTERRUPTED]


def test_task__other_ranks__record_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(task_module, "run", lambda config: {"val/selection": 0.5})
    monkeypatch.setattr(rank_zero_only, "rank", 1)

    assert task(composed_job(tmp_path)) == 0.5

    assert SweepTable(tmp_path).jobs() == []


@pytest.mark.slow
def test_task__job_after_another__gives_what_it_gives_alone(tmp_path):
    alone = run(composed(*TINY, "seed=1", folder=tmp_path / "alone"))
    torch.use_deterministic_algorithms(mode=False)

    task(composed_job(tmp_path / "a", "plugin=anchor"))
    assert not torch.are_deterministic_algorithms_enabled()
    task(composed_job(tmp_path / "b", "+trainer.benchmark=true", "trainer.deterministic=null"))
    assert not torch.backends.cudnn.benchmark
    task(composed_job(tmp_path / "c", "seed=1"))

    assert _without_times(_metrics()) == _without_times(alone)


def test_task__job_that_made_a_process_group__leaves_none(tmp_path, monkeypatch):
    def with_group(config):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        return {"val/selection": 0.5}

    monkeypatch.setattr(task_module, "run", with_group)

    task(composed_job(tmp_path))

    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("overrides", [(), ("trainer.max_epochs=0",)], ids=["done", "failed"])
def test_task__after_a_job__its_trainer_is_gone(tmp_path, monkeypatch, overrides):
    trainers = []

    class Trainer(lightning.pytorch.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(weakref.ref(self))

    monkeypatch.setattr(lightning.pytorch, "Trainer", Trainer)
    kept = None
    gc.disable()  # or it would collect by chance
    try:
        task(composed_job(tmp_path, *overrides))
    except ValueError as error:
        kept = error  # as Hydra keeps it
    alive = [trainer() is not None for trainer in trainers]
    gc.enable()

    assert (kept is not None) == bool(overrides)
    assert alive == [False]
