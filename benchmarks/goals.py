"""The goals of speed and memory as data, and whether the measured figures meet them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.timing import is_conclusive

MET, MISSED, INCONCLUSIVE, NOT_MEASURED = "met", "missed", "inconclusive", "not measured"
REPORTED = "reported"
# Ends the names of the files that were measured on a GPU; the goals are those of a CPU.
ON_GPU = "_cuda"


class Goal(NamedTuple):
    """One ratio and how large it may be.

    Args:
        number: Its number among the goals.
        what: What is compared, in words.
        script: The script that measures it.
        key: The ratio's key in the script's file.
        limit: The largest ratio that meets the goal; None: it is only reported.
    """

    number: int
    what: str
    script: str
    key: str
    limit: float | None


class Verdict(NamedTuple):
    """A goal, what was measured for it, and what follows.

    Args:
        goal: The goal.
        ratio: The measured ratio, None without one.
        control: The ratio of the reference to itself, None without one.
        verdict: ``"met"``, ``"missed"``, ``"inconclusive"`` (the control lies outside its range),
            ``"not measured"``, or ``"reported"`` where nothing is demanded.
    """

    goal: Goal
    ratio: float | None
    control: float | None
    verdict: str


def _plugin(model: str, limit: float, *, tiles: int = 10_000) -> Goal:
    what = f"plug-in / bare: {model}, {tiles:,} tiles"
    return Goal(1, what, "plugin", f"{model}, {tiles}", limit)


def _bf16(model: str, limit: float) -> Goal:
    what = f"plug-in with anchor_precision='bf16' / bare: {model}, 10,000 tiles"
    return Goal(2, what, "plugin", f"{model}, 10000, bf16", limit)


def _peer(number: int, ours: str, peer: str, limit: float | None, *, tiles: int = 10_000) -> Goal:
    what = f"our {ours} + plug-in / {peer}, bare, {tiles:,} tiles"
    return Goal(number, what, "peers", f"{ours} / {peer}, {tiles}", limit)


def _memory(key: str, limit: float | None, *, what: str | None = None) -> Goal:
    return Goal(7, f"peak memory: {what or key}, 10,000 tiles", "memory", key, limit)


def _growth(model: str, what: str) -> Goal:
    described = f"{what} per tile at 50,000 / at 5,000 tiles: {model}"
    return Goal(9, described, "growth", f"{model}, {what}", 1.15)


def _loop(what: str, key: str, limit: float | None) -> Goal:
    described = f"a fit by {what} / a plain PyTorch loop: ABMIL 384-128, 1,000 tiles"
    return Goal(8, described, "loop", key, limit)


def _reading(what: str, key: str, limit: float) -> Goal:
    described = f"{what} of 10,000 x 1024 / copying it in memory"
    return Goal(10, described, "read_bag", f"{key}, 10000 x 1024", limit)


def _floor(number: int, ours: str, peer: str, *, tiles: int = 10_000) -> Goal:
    what = f"the floor of that: only the matrix products of our {ours} + plug-in"
    key = f"products of {ours}"
    if tiles < 10_000:
        what += " and its step on 10 tiles"
        key += " + step on 10 tiles"
    described = f"{what} / {peer}, bare, {tiles:,} tiles"
    return Goal(number, described, "peers", f"{key} / {peer}, {tiles}", None)


def _anchor_floor(goal: Goal) -> Goal:
    what = "the floor of that: the bare step and its anchor's forward pass / bare"
    model = goal.what.partition(": ")[2]
    return goal._replace(what=f"{what}: {model}", key=f"{goal.key}, floor", limit=None)


_ABMIL, _ABMIL_384 = "ABMIL 1024-512-128", "ABMIL 384-128-128"
_CLAM, _TRANSMIL, _DSMIL = "CLAM-SB 1024", "TransMIL 1024", "DSMIL 1024"
_UPSTREAM = "upstream TransMIL 1024"
_GROWING = (_ABMIL, _CLAM, _TRANSMIL, _DSMIL)
_WITH_MEMORY = (
    *(_ABMIL, _ABMIL_384, _CLAM, _TRANSMIL, _DSMIL, "ASMIL 1024"),
    *(f"torchmil {name}" for name in (_ABMIL, _TRANSMIL)),
)

_WITH_ANCHOR_FLOOR = (
    _plugin(_ABMIL, 1.15),
    _plugin(_ABMIL_384, 1.28),
    _plugin(f"torchmil {_ABMIL}", 1.10),
    _plugin(_CLAM, 1.15),
    _plugin(_DSMIL, 1.42),
    _bf16(_ABMIL, 1.08),
    _bf16(_CLAM, 1.08),
    _bf16(_DSMIL, 1.32),
)

GOALS = (
    *(row for goal in _WITH_ANCHOR_FLOOR for row in (goal, _anchor_floor(goal))),
    _plugin(_TRANSMIL, 1.04)._replace(script="peers", key=f"{_TRANSMIL} / itself, 10000"),
    _plugin(_TRANSMIL, 1.04, tiles=1000),
    _peer(3, _ABMIL, f"torchmil {_ABMIL}", 0.75),
    _floor(3, _ABMIL, f"torchmil {_ABMIL}"),
    _peer(3, _ABMIL_384, f"torchmil {_ABMIL_384}", 0.75),
    _floor(3, _ABMIL_384, f"torchmil {_ABMIL_384}"),
    _peer(3, _ABMIL, f"torchmil {_ABMIL}", 0.95, tiles=1000),
    _floor(3, _ABMIL, f"torchmil {_ABMIL}", tiles=1000),
    _peer(3, _ABMIL_384, f"torchmil {_ABMIL_384}", 1.05, tiles=1000),
    _floor(3, _ABMIL_384, f"torchmil {_ABMIL_384}", tiles=1000),
    _peer(3, _ABMIL, f"textbook {_ABMIL}", None),
    _peer(3, _ABMIL_384, f"textbook {_ABMIL_384}", None),
    _peer(3, _ABMIL, "MONAI MILModel 1024-512-2048", None),
    _peer(4, _TRANSMIL, "torchmil TransMIL 1024", None),
    _peer(4, _TRANSMIL, _UPSTREAM, 0.60),
    _peer(4, _TRANSMIL, _UPSTREAM, 0.80, tiles=1000),
    _peer(5, _CLAM, "torchmil CLAM_SB 1024", 1.00),
    _floor(5, _CLAM, "torchmil CLAM_SB 1024"),
    _peer(6, _DSMIL, "torchmil DSMIL 1024", 1.30),
    _floor(6, _DSMIL, "torchmil DSMIL 1024"),
    _peer(6, _DSMIL, "textbook DSMIL 1024", None),
    *(_memory(f"{name}, plug-in", 1.10, what=f"{name}, plug-in / bare") for name in _WITH_MEMORY),
    _memory(f"{_ABMIL} / torchmil {_ABMIL}", 0.65),
    _memory(f"{_TRANSMIL} / {_UPSTREAM}", 0.50),
    _loop("a Trainer with run.py's module and data", "bare Trainer", 1.15),
    _loop("run.py with monitor, logger and checkpoints", "run.py", None),
    *(_growth(model, what) for what in ("time", "memory") for model in _GROWING),
    _reading("reading a packed bag", "read", 1.5),
    _reading("mapping a packed bag", "mapped", 0.3),
    Goal(
        11,
        "wall time: 16 small jobs by joblib with 2 workers / one after the other",
        "sweep",
        "joblib",
        0.60,
    ),
)
SCRIPTS = tuple(dict.fromkeys(goal.script for goal in GOALS))


def read_measured(folder: Path) -> dict[str, dict[str, Any]]:
    """What the scripts have written into a folder, by file: ``plugin``, and ``plugin_cuda``."""
    names = (f"{script}{suffix}" for suffix in ("", ON_GPU) for script in SCRIPTS)
    found = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def judge(measured: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """The verdict on every goal, given the scripts' files."""
    return [_judge_one(goal, measured.get(goal.script, {}).get("ratios", {})) for goal in GOALS]


def _judge_one(goal: Goal, ratios: Mapping[str, Mapping[str, Any]]) -> Verdict:
    row = ratios.get(goal.key)
    if row is None:
        return Verdict(goal, None, None, NOT_MEASURED)
    ratio, control = row["ratio"], row["control"]
    if not is_conclusive(control):
        return Verdict(goal, ratio, control, INCONCLUSIVE)
    if goal.limit is None:
        return Verdict(goal, ratio, control, REPORTED)
    return Verdict(goal, ratio, control, MET if ratio <= goal.limit else MISSED)


def cells(verdict: Verdict) -> tuple[str, ...]:
    """A row of the table of goals."""
    goal = verdict.goal
    numbers = (verdict.ratio, goal.limit, verdict.control)
    texts = ("" if number is None else f"{number:.3f}" for number in numbers)
    return (str(goal.number), goal.what, *texts, verdict.verdict)


TITLES = ("#", "what", "ratio", "at most", "A/A", "verdict")


def table(verdicts: list[Verdict]) -> Table:
    """The goals and what came of them, for a terminal."""
    table = Table(*TITLES)
    for verdict in verdicts:
        table.add_row(*cells(verdict))
    return table
