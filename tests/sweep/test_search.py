import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from copy import deepcopy
from functools import cache, partial

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from optuna.trial import TrialState

from mil_anchor.experiment import register_config
from mil_anchor.sweep import search
from mil_anchor.sweep.jobs import State, SweepTable
from mil_anchor.sweep.search import Search, command_for, register_search, searched_keys
from mil_anchor.sweep.study import opened_study
from tests.composing import ROOT

OF_RUN = ["model=abmil", "plugin=anchor", "data=musk1", "hidden=8"]
STUDY = "abmil/anchor/musk1/seed=0,fold=0,hidden=8"
SEARCHED = {"plugin.weight", "plugin.decay", "module.lr"}


def _config(out, *overrides):
    """The configuration of a search, as Hydra gives it to its callbacks."""
    config = deepcopy(_composed(overrides))
    config.out = str(out)
    return config


@cache
def _composed(overrides):
    register_config()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        arguments = ["sweep=tpe", *OF_RUN, *overrides]
        return compose("config", arguments, return_hydra_config=True)


@pytest.fixture
def begin(monkeypatch):
    """Begins a search without the thread that shows its progress."""
    monkeypatch.setattr(search.SweepProgress, "on_multirun_start", lambda *_, **__: None)
    monkeypatch.setattr(search.SweepProgress, "on_multirun_end", lambda *_, **__: None)

    def begun(out, *overrides, weight=0.1):
        config = _config(out, *overrides)
        config.plugin.weight = weight
        callback = Search("now")
        callback.on_multirun_start(config)
        return callback, config

    return begun


def _opened(out, study=STUDY):
    return opened_study(f"sqlite:///{out}/search.db", study)


def _asked(study):
    """A trial that runs."""
    trial = study.ask()
    trial.suggest_loguniform("plugin.weight", 0.001, 1.0)
    trial.suggest_categorical("plugin.decay", [0.9, 0.99, 0.999, 0.9999])
    trial.suggest_loguniform("module.lr", 0.00003, 0.003)
    return trial


def test_search__first_start__has_all_trials_to_do_in_a_folder_that_is_made(tmp_path, begin):
    _, config = begin(tmp_path / "new" / "folder")

    assert (tmp_path / "new" / "folder" / "search.db").exists()
    assert config.hydra.sweeper.study_name == STUDY
    assert (config.hydra.sweeper.n_trials, config.hydra.sweeper.sampler.seed) == (30, 0)


def test_search__started_again__has_what_is_left_and_draws_other_values(tmp_path, begin):
    callback, _ = begin(tmp_path)
    study = _opened(tmp_path)
    study.tell(_asked(study), 0.5)
    study.tell(_asked(study), 0.7)
    study.tell(_asked(study), state=TrialState.FAIL)  # not a result: to be made up for
    del callback

    _, config = begin(tmp_path, "hydra.sweeper.n_trials=5")

    assert config.hydra.sweeper.n_trials == 3
    assert config.hydra.sweeper.sampler.seed == 3


def test_search__that_has_all_its_trials__has_nothing_left_to_do(tmp_path, begin):
    callback, _ = begin(tmp_path)
    study = _opened(tmp_path)
    for value in (0.5, 0.7, 0.6):
        study.tell(_asked(study), value)
    del callback

    _, config = begin(tmp_path, "hydra.sweeper.n_trials=2")

    assert config.hydra.sweeper.n_trials == 0


def test_search__trial_that_was_running__fails_and_is_asked_for_first(tmp_path, begin):
    callback, _ = begin(tmp_path)
    study = _opened(tmp_path)
    complete, killed = _asked(study), _asked(study)
    study.tell(complete, 0.5)
    study.ask()  # killed before it had values
    del callback

    begin(tmp_path)

    study = _opened(tmp_path)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]
    assert _asked(study).params == killed.params
    assert _asked(study).params != killed.params


def test_search__of_other_choices__is_another_study(tmp_path, begin):
    begin(tmp_path)
    study = _opened(tmp_path)
    study.tell(_asked(study), 0.5)

    _, config = begin(tmp_path, "trainer.max_epochs=7")

    assert config.hydra.sweeper.study_name == f"{STUDY},trainer.max_epochs=7"
    assert config.hydra.sweeper.n_trials == 30


def test_search__other_configuration_of_the_same_name__is_refused(tmp_path, begin):
    callback, _ = begin(tmp_path, "data=folder", "data.root=/a")
    del callback

    with pytest.raises(SystemExit, match=r"these differ: \['data.root'\]. Choose another out="):
        begin(tmp_path, "data=folder", "data.root=/b")


def test_search__with_another_default_of_what_is_searched__goes_on(tmp_path, begin):
    callback, _ = begin(tmp_path)
    study = _opened(tmp_path)
    study.tell(_asked(study), 0.5)
    del callback

    _, config = begin(tmp_path, weight=0.3)

    assert config.hydra.sweeper.n_trials == 29


def test_search__in_two_processes__is_refused(tmp_path, begin):
    callback, _ = begin(tmp_path)
    with pytest.raises(SystemExit, match=f"one process at a time, but another one is at {STUDY}"):
        begin(tmp_path)
    begin(tmp_path, "seed=1")  # another study
    del callback

    begin(tmp_path)


def test_search__storage_that_is_no_database__is_refused(tmp_path, begin):
    (tmp_path / "search.db").write_text("no database " * 100)

    with pytest.raises(SystemExit, match=r"(?s)URL of a database that opens, but sqlite:///.*"):
        begin(tmp_path)


def test_search__without_optuna__says_what_to_install(tmp_path, monkeypatch):
    config = _config(tmp_path)
    monkeypatch.setattr(search, "find_spec", lambda _: None)

    with pytest.raises(SystemExit, match=r"Run: pip install 'mil_anchor\[optuna\]'"):
        Search("now").on_multirun_start(config)


def test_register_search__without_optuna__lets_the_search_compose(tmp_path, monkeypatch):
    sweepers = ConfigStore.instance().repo["hydra"]["sweeper"]
    monkeypatch.delitem(sweepers, "optuna.yaml")
    _composed.cache_clear()
    with pytest.raises(MissingConfigException, match="Could not find 'hydra/sweeper/optuna'"):
        _config(tmp_path)
    monkeypatch.setattr(search, "find_spec", lambda _: None)

    register_search()

    assert _config(tmp_path).hydra.sweeper.n_trials == 30


def test_searched_keys__fixed_on_the_command_line__are_not_searched(tmp_path):
    assert searched_keys(_config(tmp_path)) == SEARCHED
    assert searched_keys(_config(tmp_path, "plugin.decay=0.5")) == SEARCHED - {"plugin.decay"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "plugin=none",
            r"\['plugin.decay', 'plugin.weight'\] are not with model=abmil plugin=none",
        ),
        ("plugin=aem", r"\['plugin.decay'\] are not with model=abmil plugin=aem. Choose another"),
        ("+hydra.sweeper.params={seed:'0,1'}", r"several values of \['seed'\].* the luckiest"),
        ("+hydra.sweeper.params={data.fold:'0,1'}", r"several values of \['data.fold'\]"),
        ("+experiment=table2", r"several values of \['seed'\]"),
    ],
)
def test_searched_keys__that_make_no_search__are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        searched_keys(_config(tmp_path, override))


def test_searched_keys__of_the_training__may_be_the_data_modules(tmp_path):
    config = _config(tmp_path, "+hydra.sweeper.params={data.batch_size:'1,2'}")

    assert searched_keys(config) == {*SEARCHED, "data.batch_size"}


def test_searched_keys__of_a_group_that_is_chosen_too__are_looked_for_in_the_trials(tmp_path):
    config = _config(tmp_path, "+hydra.sweeper.params={plugin:'anchor,anchor_nsf'}")
    config.plugin = {}

    # The command line's plugin=anchor wins over the list.
    assert searched_keys(config) == SEARCHED


def test_command_for__search__trains_and_tests_the_best():
    searched = ["sweep=tpe", *OF_RUN, "out=/tmp/x", "test=false", "plugin=anchor,slow_anchor"]

    words = shlex.split(command_for({"plugin": "anchor", "module.lr": 1e-05}, searched))

    assert words[0] == "python"
    assert words[2:] == [
        "model=abmil",
        "plugin=anchor",
        "data=musk1",
        "hidden=8",
        "plugin=anchor",
        "module.lr=1e-05",
    ]


def _started(out, *overrides, **environment):
    command = [sys.executable, "run.py", "-m", "sweep=tpe", *OF_RUN, f"out={out}", *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _ended(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def _trials(out, state, study=STUDY):
    return _opened(out, study).get_trials(states=(state,))


def _folder(out, trial, more=""):
    values = ",".join(f"{key}={value}" for key, value in sorted(trial.params.items()))
    return out / f"{STUDY},{values}{more}"


LONGER = "trainer.max_epochs=30"


@pytest.mark.slow
def test_search__killed_and_started_again__completes_its_trials_and_repeats_none(tmp_path):
    of_search = ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", LONGER]
    study = f"{STUDY},{LONGER}"
    folder = partial(_folder, tmp_path, more=f",{LONGER}")
    first = _started(tmp_path, *of_search)
    deadline_s = time.monotonic() + 200
    while True:
        assert time.monotonic() < deadline_s
        assert first.poll() is None
        time.sleep(0.05)
        if not (tmp_path / "sweep.csv").exists():
            continue
        states = [job.state for job in SweepTable(tmp_path).jobs()]
        begun = list(tmp_path.rglob("last.ckpt"))
        if states == [State.DONE, State.RUNNING] and len(begun) == 2:
            break
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=100)
    (kept,) = _trials(tmp_path, TrialState.COMPLETE, study)
    (killed,) = _trials(tmp_path, TrialState.RUNNING, study)
    written_ns = (folder(kept) / "metrics.json").stat().st_mtime_ns

    output = _ended(_started(tmp_path, *of_search))

    assert "1 of 3 trials are complete already" in output
    trials = _trials(tmp_path, TrialState.COMPLETE, study)
    assert len(trials) == 3
    assert killed.params in [trial.params for trial in trials]
    assert "Continuing from" in (folder(killed) / "run.log").read_text()
    assert len({json.dumps(trial.params) for trial in trials}) == 3
    assert (folder(kept) / "metrics.json").stat().st_mtime_ns == written_ns
    assert len(list(tmp_path.rglob("metrics.json"))) == 3
    _check_best(output, trials)
    for trial in trials:
        _check_trial(folder(trial), trial)
    # Nothing is left to do.
    assert "3 of 3 trials are complete already" in _ended(_started(tmp_path, *of_search))
    assert len(list(tmp_path.rglob("metrics.json"))) == 3


def _check_best(output, trials):
    best = max(trials, key=lambda trial: trial.value)
    command = re.search(r"To train and test it:\n(python run.py .*)\n", output).group(1)
    values = {f"{key}={value}" for key, value in best.params.items()}
    assert set(shlex.split(command)[2:]) == {*OF_RUN, LONGER, *values}


def _check_trial(folder, trial):
    """Its value is the validation score, and of the test bags there is nothing."""
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["val/selection"] == trial.value
    assert not [key for key in metrics if key.startswith("test")]
    with (folder / "predictions.csv").open() as file:
        assert {row["split"] for row in csv.DictReader(file)} == {"val"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["plugin"]["weight"] == trial.params["plugin.weight"]
    assert config["plugin"]["decay"] == trial.params["plugin.decay"]
    assert config["module"]["lr"] == trial.params["module.lr"]


@pytest.mark.slow
def test_search__trial_that_fails__does_not_end_it(tmp_path):
    params = "hydra.sweeper.params={plugin.weight:'-1.0,0.001'}"  # a weight below 0 is refused
    others = ["plugin.decay=0.9", "module.lr=0.001", "trainer.max_epochs=1"]
    process = _started(tmp_path, params, *others, "hydra.sweeper.n_trials=4")

    output = process.communicate(timeout=300)[0]

    assert process.returncode == 1  # as of every sweep with a failed job
    study = f"{STUDY},module.lr=0.001,plugin.decay=0.9,trainer.max_epochs=1"
    assert _trials(tmp_path, TrialState.FAIL, study)
    assert _trials(tmp_path, TrialState.COMPLETE, study)
    assert "plugin.weight=0.001" in output.splitlines()[-1]


TOLD = """
import json
from pathlib import Path

from mil_anchor import AnchorCallback


class Told(AnchorCallback):
    def on_fit_end(self, trainer, pl_module):
        super().on_fit_end(trainer, pl_module)
        told = {
            "plugin.weight": self.weight,
            "module.lr": trainer.optimizers[0].defaults["lr"],
        }
        file = Path(trainer.default_root_dir) / f"rank_{trainer.global_rank}.json"
        file.write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_search__of_runs_in_two_processes__gives_both_the_same_values(tmp_path):
    (tmp_path / "told.py").write_text(TOLD)
    (tmp_path / "conf" / "plugin").mkdir(parents=True)
    file = tmp_path / "conf" / "plugin" / "told.yaml"
    file.write_text(yaml.safe_dump({"defaults": ["anchor", "_self_"], "_target_": "told.Told"}))
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1"]
    own = ["plugin=told", f"hydra.searchpath=[file://{tmp_path / 'conf'}]"]

    process = _started(tmp_path, *ddp, *own, "hydra.sweeper.n_trials=2", PYTHONPATH=str(tmp_path))

    _ended(process)
    told = {
        folder: [json.loads(f.read_text()) for f in sorted(folder.glob("rank_*.json"))]
        for folder in (f.parent for f in tmp_path.rglob("metrics.json"))
    }
    assert len(told) == 2
    for folder, ranks in told.items():
        config = yaml.safe_load((folder / "config.yaml").read_text())
        values = {"plugin.weight": config["plugin"]["weight"], "module.lr": config["module"]["lr"]}
        assert ranks == [values, values]
    assert len({json.dumps(ranks) for ranks in told.values()}) == 2
