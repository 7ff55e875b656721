"""A study of Optuna in its storage: begun, or taken up where a search left it."""

import json
import logging
import warnings
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError  # type: ignore[import-untyped]

from mil_anchor.settings import bearing, flat_config

# The name of what a study keeps to tell whether a search is the one that began it.
_CONFIGURATION = "configuration"


class SoFar(NamedTuple):
    """The trials of a study.

    Args:
        n_begun: Of any state.
        n_complete: Those that have a value.
    """

    n_begun: int
    n_complete: int


def begin(storage: str, name: str, common: dict[str, Any]) -> SoFar:
    """Begin a study, or take it up: what was running is marked as failed and queued again.

    Args:
        storage: URL of its database.
        name: Of the study.
        common: The configuration that all of its trials have in common.

    Returns:
        The trials that it had before.

    Raises:
        ValueError: It was begun with another configuration.
    """
    # It would report the study as one that it found, on every start: Hydra's sweeper opens it anew.
    optuna.logging.set_verbosity(logging.WARNING)
    study = opened_study(storage, name)
    own = bearing(flat_config(common))
    earlier = json.loads(study.user_attrs.get(_CONFIGURATION, json.dumps(own)))
    changed = sorted({key for key, _ in own.items() ^ earlier.items()})
    if changed:
        raise ValueError(
            f"The study {name} in {storage} was begun with another configuration, and its trials "
            f"cannot be compared with new ones; these differ: {changed}. Choose another out=..."
        )
    study.set_user_attr(_CONFIGURATION, json.dumps(own))
    so_far = SoFar(len(study.trials), n_complete(study))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.enqueue_trial(trial.params)
    return so_far


def opened_study(storage: str, name: str) -> optuna.Study:
    """The study of this name, which maximises; a new one if there is none.

    Raises:
        ValueError: The storage cannot be opened.
    """
    try:
        return optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )
    except (StorageInternalError, SQLAlchemyError) as error:
        raise ValueError(
            f"hydra.sweeper.storage must be the URL of a database that opens, but {storage} does "
            f"not: {error}. Choose another out=..., or remove a broken file."
        ) from error


def n_complete(study: optuna.Study) -> int:
    """Trials of a study that have a value."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
