"""The search of ``sweep=tpe``: goes on where it stopped, and ends with the command for its best."""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from mil_anchor.sweep.progress import SweepProgress

log = logging.getLogger(__name__)

_SWEEPER = "hydra_plugins.hydra_optuna_sweeper"
# Of the command of a search, what the run with its best values does not take over.
_OF_SEARCH = {"sweep", "out", "test", "maps", "trainer.enable_progress_bar"}
# Of the data, what does not decide which bags are validated.
_DATA_OF_TRAINING = {"data.batch_size", "data.balanced"}
_MISSING = object()


def register_search() -> None:
    """Let ``sweep=tpe`` compose where Optuna is missing, so that `Search` can say what to do."""
    if find_spec(_SWEEPER) is None:
        ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node={})


class Search(SweepProgress):
    """Hydra's callback of a search: a sweep's, and it lets Optuna's sweeper continue a study.

    ``hydra.sweeper.n_trials`` becomes the number of complete trials that the study shall have in
    the end, whichever start made them. A trial that was running when its search was killed is
    marked as failed, and its values come first in the queue: its run goes on. The sampler's seed
    moves on by the trials that there are, for with its first seed it would draw their values again.

    In the end the best values are logged, with the command that trains and tests them.

    Exits with a message where the search would not be what it says it is: Optuna is not installed,
    a searched key is not in the configuration, the search is over seeds or data, the study was
    begun with another configuration, or another process is in it.

    Args:
        started: See `SweepProgress`.
    """

    def __init__(self, started: str) -> None:
        super().__init__(started)
        # For as long as this process lives: Hydra does not say when a search has failed.
        self._lock: FileLock | None = None

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        HydraConfig.instance().set_config(config)  # the study's name asks it for the choices
        try:
            self._prepare(config)
        except (ValueError, ModuleNotFoundError, OmegaConfBaseException) as error:
            # Hydra makes a warning of any exception in a callback, and goes on.
            raise SystemExit(str(error)) from error
        super().on_multirun_start(config, **kwargs)

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            super().on_multirun_end(config, **kwargs)
        finally:
            _log_best(config)

    def _prepare(self, config: DictConfig) -> None:
        if find_spec(_SWEEPER) is None:
            raise ModuleNotFoundError(
                "A search needs Hydra's sweeper for Optuna, which is not installed. "
                "Run: pip install 'mil_anchor[optuna]'"
            )
        logging.getLogger("alembic").setLevel(logging.WARNING)  # tells each plug-in that it loads
        from mil_anchor.sweep.study import begin

        searched = searched_keys(config)
        sweeper = config.hydra.sweeper
        self._lock = _held(Path(config.hydra.sweep.dir), sweeper.study_name)
        so_far = begin(sweeper.storage, sweeper.study_name, _resolved(config, without=searched))
        if so_far.n_begun:
            log.info("%d of %d trials are complete already", so_far.n_complete, sweeper.n_trials)
        with read_write(config.hydra):
            sweeper.n_trials = max(0, sweeper.n_trials - so_far.n_complete)
            if sweeper.sampler.seed is not None:
                sweeper.sampler.seed += so_far.n_begun


def searched_keys(config: DictConfig) -> set[str]:
    """The keys whose values the sweeper draws.

    Args:
        config: The configuration of the whole search, with its ``hydra`` node.

    Raises:
        ValueError: One of them says which bags are validated, or is not in the configuration.
    """
    params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    drawn = {one.get_key_element() for one in overrides if one.is_sweep_override()}
    searched = drawn - {one.get_key_element() for one in overrides if not one.is_sweep_override()}
    _check_bags(searched)
    # The group of a key may be one of those that the sweeper chooses.
    later = drawn | set(config.hydra.sweeper.params)
    missing = sorted(
        key
        for key in searched
        if key.split(".")[0] not in later
        and OmegaConf.select(config, key, default=_MISSING) is _MISSING
    )
    if missing:
        choices = config.hydra.runtime.choices
        raise ValueError(
            f"Every key of a search must be in the configuration, but {missing} are not with "
            f"model={choices.model} plugin={choices.plugin}. Choose another plug-in, such as "
            "plugin=anchor, or write a conf/sweep/NAME.yaml with other hydra.sweeper.params."
        )
    return searched


def command_for(best: Mapping[str, Any], search: Sequence[str]) -> str:
    """The command of one run with the best values of a search, into the usual ``out``.

    Args:
        best: The values by their keys.
        search: The command line of the search.

    Example:
        >>> search = ["sweep=tpe", "plugin=anchor", "out=/tmp"]
        >>> command_for({"plugin.weight": 0.03}, search).partition("plugin")[1:]
        ('plugin', '=anchor plugin.weight=0.03')
    """
    parsed = OverridesParser.create().parse_overrides(list(search))
    kept = [
        one.input_line
        for one in parsed
        if not one.is_sweep_override() and one.get_key_element() not in _OF_SEARCH
    ]
    values = [f"{key}={value}" for key, value in best.items()]
    return shlex.join(["python", sys.argv[0], *map(str, kept), *values])


def _check_bags(searched: set[str]) -> None:
    varying = sorted(
        key
        for key in searched
        if key.split(".")[0] in ("seed", "data") and key not in _DATA_OF_TRAINING
    )
    if varying:
        raise ValueError(
            "The trials of a search must be validated on the same bags, but it has several values "
            f"of {varying} to choose from, and would choose the luckiest. Give each one value, and "
            "start a search for each."
        )


def _log_best(config: DictConfig) -> None:
    from mil_anchor.sweep.study import n_complete, opened_study

    study = opened_study(config.hydra.sweeper.storage, config.hydra.sweeper.study_name)
    best = study.best_trial
    log.info(
        "Best of %d trials: number %d, val/selection %.4f. To train and test it:\n%s",
        n_complete(study),
        best.number,
        best.value,
        command_for(best.params, config.hydra.overrides.task),
    )


def _held(out: Path, study_name: str) -> FileLock:
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / f".{study_name.replace('/', '_')}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"A search must be run by one process at a time, but another one is at {study_name} in "
            f"{out}. Wait until it is done, or choose another out=..."
        ) from error
    return lock


def _resolved(config: DictConfig, *, without: set[str]) -> dict[str, Any]:
    """The values that all trials have in common."""
    groups = [str(key) for key in config if key != "hydra"]
    common: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, groups), resolve=True)
    for key in without:
        *path, last = key.split(".")
        node = common
        for name in path:
            node = node.get(name, {})
        node.pop(last, None)
    return dict(common)
