import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.settings import bearing, flat_config, telling_keys


def _runs(*configs):
    return [{"seed": "0", **config} for config in configs]


def test_flat_config__tree__has_dotted_leaves_and_counts_devices():
    config = {
        "trainer": {"devices": [3], "gradient_clip_val": None},
        "a": {"b": {"c": "x"}},
        "d": {},
    }

    assert flat_config(config) == {
        "trainer.devices": "1",
        "trainer.gradient_clip_val": "null",
        "a.b.c": "x",
    }


def test_bearing__incidental_keys__are_gone():
    kept = {"module.lr": "1", "data.seed": "0", "seeds": "3", "output": "x"}
    gone = dict.fromkeys(
        ("seed", "data.fold", "out", "names.model", "logger.csv.name", "logger", "threads"), "1"
    )

    assert bearing({**kept, **gone}) == kept


@pytest.mark.parametrize(
    ("configs", "keys"),
    [
        ([{"plugin.weight": "0.1"}, {"plugin.weight": "0.3"}], ["plugin.weight"]),
        (
            [{"hidden": "1", "model.hidden": "1"}, {"hidden": "2", "model.hidden": "2"}],
            ["hidden"],
        ),
        (
            [
                {"plugin.weight": "1", "plugin.decay": "1"},
                {"plugin.weight": "2", "plugin.decay": "2"},
            ],
            ["plugin.decay", "plugin.weight"],
        ),
        ([{}, {"plugin.a": "1", "plugin.b": "1"}], ["plugin.a"]),
        (
            [{"plugin.schedule": "constant"}, {"plugin.schedule.start": "0"}],
            ["plugin.schedule", "plugin.schedule.start"],
        ),
        ([{"out": "a"}, {"out": "b"}], ["out"]),
    ],
)
def test_telling_keys__runs_of_one_draw__are_told_apart(configs, keys):
    assert telling_keys(_runs(*configs), [(0, 0)] * len(configs)) == keys


def test_telling_keys__keys_that_follow_seed_or_fold__tell_nothing():
    configs = [{"data.seed": str(seed), "data.world": str(fold)} for seed, fold in [(0, 2), (1, 3)]]

    assert telling_keys(configs, [(0, 2), (1, 3)]) == []


@settings(derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.dictionaries(
                st.sampled_from(["plugin.a", "plugin.b", "x.a", "hidden"]), st.sampled_from("12")
            ),
        ),
        max_size=8,
    )
)
def test_telling_keys__any_runs__equal_labels_mean_equal_configurations(runs):
    """Nothing is ever averaged silently: the law that the labels exist for."""
    configs = [{**config, "out": str(place)} for place, (_, config) in enumerate(runs)]
    keys = telling_keys(configs, [(seed + 100, 0) for seed, _ in runs])
    labels = {}
    for config in configs:
        label = tuple((key, config[key]) for key in keys if key in config)
        labels.setdefault(label, []).append(bearing(config))

    for members in labels.values():
        assert all(member == members[0] for member in members)
