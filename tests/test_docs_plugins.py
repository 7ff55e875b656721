"""Commands, generated parts and claims of docs/plugins.md."""

import itertools
import json
import re
import shlex

import pytest
import yaml
from scipy.stats import ttest_1samp

from docs.plugins import MEASURED, PAGE, PAGES, SETS, by_slides, interval, page, paired
from mil_anchor.composition import check_arguments
from tests.composing import ROOT, composed

TEXT = PAGE.read_text()
MEASURES = json.loads(MEASURED.read_text())
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python run.py")
]


def _jobs(command):
    """Overrides of every job of a command: those of its experiment file, and its own."""
    words = shlex.split(command)[3:]
    name = next(word.partition("=")[2] for word in words if word.startswith("+experiment="))
    swept = {}
    for file in ("plugins", name):
        text = (ROOT / "conf" / "experiment" / f"{file}.yaml").read_text()
        swept |= yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    swept |= dict(word.split("=", 1) for word in words)
    values = [[f"{key}={one}" for one in str(own).split(",")] for key, own in swept.items()]
    return itertools.product(*values)


def test_page__generated_parts__are_up_to_date():
    for file in PAGES:
        assert page(file.read_text(), MEASURES) == file.read_text(), "run: python -m docs.plugins"


@pytest.mark.parametrize("command", COMMANDS)
def test_page__command__composes(command):
    for job in itertools.islice(_jobs(command), 0, None, 97):
        check_arguments(composed(*job))


def test_page__commands__make_the_runs_that_were_measured():
    told = dict.fromkeys(SETS, 0)
    for command in COMMANDS:
        kind = re.search(r"out=outputs/plugins/(\w+)", command)
        told["table" if kind is None else kind[1]] += len(list(_jobs(command)))

    assert told == {kind: sum(row["set"] == kind for row in MEASURES["runs"]) for kind in SETS}


def test_measures__table__is_complete():
    rows = [row for row in MEASURES["runs"] if row["set"] == "table"]
    cells = {(row["data"], row["model"], row["plugin"], row["seed"]) for row in rows}

    assert len(cells) == len(rows) == 5 * 9 * 3 * 5


def test_interval__differences__equal_scipys():
    values = [0.1, -0.3, 0.2, 0.05, 0.4]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)

    assert interval(values) == pytest.approx((sum(values) / 5, *expected))


def test_paired__runs_of_two_models__are_matched_and_averaged_by_slides():
    def row(model, seed, f1):
        return {"data": "d", "model": model, "seed": seed, "fold": seed, "f1": f1}

    base = [row(model, seed, 0.5) for model in "ab" for seed in (0, 1)]
    own = [row("a", 0, 0.6), row("b", 0, 0.8), row("a", 1, 0.4), row("a", 2, 0.9)]

    assert paired(own, base, "f1") == pytest.approx([0.1, 0.3, -0.1])
    means = by_slides(lambda rows: paired(rows, base, "f1"), own)
    assert means == pytest.approx([0.2, -0.1])
