import pytest
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from mil_anchor.experiment import run
from mil_anchor.sweep.jobs import State, SweepTable
from mil_anchor.sweep.ranks import check_ranks, check_tasks
from mil_anchor.sweep.task import task
from tests.composing import composed
from tests.sweep.jobs_of_sweeps import TINY, composed_job

TWO_PROCESSES = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local", "submitit_slurm"])
def test_task__job_that_would_start_processes__is_refused_before_training(tmp_path, launcher):
    config = composed_job(tmp_path, *TWO_PROCESSES, launcher=launcher)

    with pytest.raises(ValueError, match=r"must not start processes .* asks for 2\. Leave .*"):
        task(config)

    (job,) = SweepTable(tmp_path).jobs()
    assert job.state is State.FAILED
    assert "hydra/launcher=processes" in job.error
    assert "hydra.launcher.tasks_per_node=2" in job.error
    assert not (tmp_path / job.folder / "checkpoints").exists()


def test_check_ranks__single_run__may_start_processes(tmp_path):
    composed(*TINY)

    check_ranks(Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False))


class Externally(LightningEnvironment):
    creates_processes_externally = True


def test_check_ranks__processes_of_the_cluster__must_be_as_many_as_the_trainers(tmp_path):
    two = Trainer(accelerator="cpu", devices=2, strategy="ddp", plugins=[Externally()])
    one = Trainer(accelerator="cpu", devices=1, logger=False)
    composed_job(tmp_path, "hydra.launcher.tasks_per_node=2", launcher="submitit_slurm")

    check_ranks(two)
    with pytest.raises(ValueError, match=r"starts 2 and the trainer asks for 1\. Set hydra"):
        check_ranks(one)
    composed_job(tmp_path, launcher="submitit_slurm")
    check_ranks(one)
    with pytest.raises(ValueError, match=r"starts 1 and the trainer asks for 2\. Set hydra"):
        check_ranks(two)


def test_check_tasks__several_local_tasks__are_refused_without_touching_the_folder(tmp_path):
    config = composed_job(tmp_path, "hydra.launcher.tasks_per_node=2", launcher="submitit_local")

    with pytest.raises(ValueError, match=r"gives them no ranks, but hydra\.launcher\.tasks_per"):
        task(config)

    assert not list(tmp_path.rglob("config.yaml"))
    for launcher in ("basic", "joblib", "submitit_local", "submitit_slurm"):
        composed_job(tmp_path, launcher=launcher)
        check_tasks(HydraConfig.get().launcher)


def test_run__threads__are_its_own_share_and_given_back(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr("mil_anchor.experiment.thread_share", lambda: 3)

    run(composed(*TINY, "threads=null", folder=tmp_path / "share"))
    assert chosen == [3, 7]
    with pytest.raises(Exception, match="lr must be"):
        run(composed(*TINY, "threads=2", "module.lr=0.0", folder=tmp_path / "wrong"))
    assert chosen == [3, 7, 2, 7]
