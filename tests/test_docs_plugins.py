"""Commands, generated parts and claims of docs/plugins.md."""

import itertools
import json
import re
import shlex
from statistics import fmean, stdev

import hydra
import pytest
import yaml
from scipy.stats import ttest_1samp

from docs.plugins import MEASURED, PAGE, PAGES, SETS, by_slides, interval, page, paired, ratios
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


def test_claims__sizes__are_those_of_the_data():
    n_train, n_test = set(), set()
    for overrides in (
        ["+experiment=plugins"],
        *(
            ["+experiment=plugins_synthetic", "data.size=tiny", f"data.preset={preset}"]
            for preset in ("camelyon_like", "bracs_like")
        ),
    ):
        data = hydra.utils.instantiate(composed(*overrides).data)
        data.setup("fit")
        n_train.add(len(data.train_bags))
        n_test.add(len(data.test_bags))

    text = " ".join(TEXT.split())
    assert f"({min(n_train)} to {max(n_train)} bags to train on" in text
    assert f", {min(n_test)} to {max(n_test)} to test)" in text


def _changes(plugin, key, **chosen):
    """Mean and interval of the difference to no plug-in, over the runs that are chosen."""
    rows = [row for row in MEASURES["runs"] if row["set"] == "table"]
    base = [row for row in rows if row["plugin"] == "none"]
    own = [
        row
        for row in rows
        if row["plugin"] == plugin and all(row[name] == value for name, value in chosen.items())
    ]
    return interval(by_slides(lambda part: paired(part, base, key), own))


def _all(name):
    return sorted({row[name] for row in MEASURES["runs"] if row["set"] == "table"})


def test_claims__no_plugin__changes_f1_or_auroc_by_more_than_chance():
    for plugin in set(_all("plugin")) - {"none"}:
        for key in ("f1", "auroc"):
            _, low, high = _changes(plugin, key)
            assert low < 0 < high, (plugin, key)


def test_claims__defaults__lose_in_no_cell():
    for plugin, data, model in itertools.product(
        ("anchor", "anchor_nsf"), _all("data"), _all("model")
    ):
        for key in ("f1", "auroc"):
            assert _changes(plugin, key, data=data, model=model)[2] >= 0, (plugin, data, model)


def test_claims__seed_alone__moves_f1_by_more_than_any_plugin():
    rows = [row for row in MEASURES["runs"] if row["set"] == "seeds"]
    spreads = [
        stdev(row["f1"] for row in rows if (row["data"], row["model"]) == cell)
        for cell in itertools.product(_all("data"), _all("model"))
    ]
    largest = max(abs(_changes(plugin, "f1")[0]) for plugin in set(_all("plugin")) - {"none"})

    assert fmean(spreads) > 3 * largest


def _mean(plugin, key):
    rows = [row for row in MEASURES["runs"] if (row["set"], row["plugin"]) == ("table", plugin)]
    return fmean(row[key] for row in rows)


def test_claims__steadiness__is_what_readme_says():
    rows = [row for row in MEASURES["runs"] if row["set"] == "table"]
    base = [row for row in rows if row["plugin"] == "none"]
    early = {
        plugin: float(ratios([r for r in rows if r["plugin"] == plugin], base)[0].split()[1])
        for plugin in set(_all("plugin")) - {"none"}
    }

    assert min(early, key=early.get) == "slow_anchor"
    assert max(early.values()) < 1
    slow = [row for row in rows if row["plugin"] == "slow"]
    assert float(ratios(slow, base)[1].split()[1]) > 1
    assert abs(_mean("slow", "entropy") - _mean("none", "entropy")) < 0.01
    for plugin in ("anchor", "anchor_nsf", "anchor_nsf_centered", "uniform", "frozen"):
        assert _mean(plugin, "entropy") > _mean("none", "entropy") + 0.1


def test_claims__lesions__are_found_better_with_an_anchor_and_with_the_control():
    for plugin in ("anchor", "anchor_nsf", "frozen"):
        assert _changes(plugin, "tile_auroc")[1] > 0


def test_claims__defaults__are_best_on_validation_among_their_weights():
    rows = [row for row in MEASURES["runs"] if row["set"] == "choice"]
    base = [r for r in MEASURES["runs"] if r["set"] == "table" and r["plugin"] == "none"]
    for plugin, chosen in (("anchor", 0.1), ("anchor_nsf", 0.03)):
        of_plugin = [row for row in rows if row["plugin"] == plugin]
        plain = [
            row
            for row in of_plugin
            if (row["decay"], row["schedule"], row["warmup"]) == (0.999, "constant", False)
        ]
        scores = {
            weight: fmean(
                (paired([row], base, "val_f1")[0] + paired([row], base, "val_auroc")[0]) / 2
                for row in plain
                if row["weight"] == weight
            )
            for weight in {row["weight"] for row in plain}
        }
        assert max(scores, key=scores.get) == chosen == composed(f"plugin={plugin}").plugin.weight


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
