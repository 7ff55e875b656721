import io

import pytest
from rich.console import Console

from benchmarks.goals import GOALS, SCRIPTS, Goal, cells, judge, read_measured, table

PLUGIN = next(goal for goal in GOALS if goal.script == "plugin")


def judged(ratio, control, *, goal=PLUGIN):
    measured = {goal.script: {"ratios": {goal.key: {"ratio": ratio, "control": control}}}}
    return next(verdict for verdict in judge(measured) if verdict.goal == goal)


@pytest.mark.parametrize(
    ("ratio", "control", "expected"),
    [
        (1.15, 1.0, "met"),
        (1.151, 1.0, "missed"),
        (1.0, 1.04, "inconclusive"),
        (2.0, 0.96, "inconclusive"),
        (1.0, None, "met"),
    ],
)
def test_judge__ratio_and_control__give_the_verdict(ratio, control, expected):
    assert PLUGIN.limit == 1.15
    assert judged(ratio, control).verdict == expected


def test_judge__goal_without_a_limit__is_reported():
    goal = next(goal for goal in GOALS if goal.limit is None)
    assert judged(3.0, 1.0, goal=goal).verdict == "reported"


def test_judge__nothing_measured__says_so_of_every_goal():
    assert {verdict.verdict for verdict in judge({})} == {"not measured"}


def test_goals__numbers__are_those_of_the_issue():
    assert sorted({goal.number for goal in GOALS}) == list(range(1, 12))
    assert len({(goal.script, goal.key) for goal in GOALS}) == len(GOALS)


def test_read_measured__folder_with_two_files__has_these(tmp_path):
    (tmp_path / "plugin.json").write_text('{"ratios": {}}')
    (tmp_path / "peers_cuda.json").write_text('{"ratios": {}}')
    assert list(read_measured(tmp_path)) == ["plugin", "peers_cuda"]


def test_cells__verdict__names_goal_ratio_limit_and_control():
    goal = Goal(3, "ours / theirs", *PLUGIN[2:])
    verdict = judged(0.5, 1.0)._replace(goal=goal)
    assert cells(verdict) == ("3", "ours / theirs", "0.500", "1.150", "1.000", "met")


def test_table__no_figures__lists_every_goal():
    console = Console(file=io.StringIO(), width=200)
    console.print(table(judge({})))
    assert console.file.getvalue().count("not measured") == len(GOALS)


def test_scripts__makefile__runs_each_once_and_the_results_last(request):
    makefile = (request.config.rootpath / "Makefile").read_text()
    runs = makefile.partition("\nbench:")[2].partition("\n\n")[0].partition("for script in ")[2]
    scripts = runs.partition(";")[0].split()
    assert sorted(scripts) == sorted(SCRIPTS)
    assert "benchmarks.results" in runs
