import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.report.curves import attention_curves, learning_curves, reliability, rounded
from mil_anchor.results import read_runs
from tests.report.run_folders import write_attention, write_log, write_predictions, write_run


def _run(root, **settings):
    write_run(root, **settings)
    return read_runs(root)[0]


def test_attention_curves__two_bags__are_the_means_by_epoch(tmp_path):
    run = _run(tmp_path)
    write_attention(run.folder, [[0, 0], [0.1, 0.3], [0.001, 0.002]])

    curves = attention_curves(run)

    assert curves["jsd"] == [None, 0.2, 0.0015]
    assert curves["entropy"] == [0.9, 0.9, 0.9]
    # What is defined nowhere has no curve.
    assert set(curves) == {"jsd", "entropy", "top1pct", "top10"}


def test_learning_curves__validation_after_the_fit__is_no_epoch(tmp_path):
    curves = learning_curves(_run(tmp_path))

    assert curves == {
        "train/loss": [1.0, 0.5, 0.3333, 0.25],
        "val/loss": [0.5] * 4,
        "val/f1": [0.25] * 4,
    }


def test_learning_curves__resumed_run__takes_the_later_version_and_whole_rows(tmp_path):
    run = _run(tmp_path, keeps=())
    write_log(run.folder, 2, [(0, 3.0, 0.5), (1, 2.0, 0.5)])
    write_log(run.folder, 10, [(1, 5.0, 0.5), (2, 4.0, 0.5)], torn="3,3,1.")

    assert learning_curves(run)["train/loss"] == [3.0, 5.0, 4.0]


def test_curves__run_that_kept_nothing__are_none(tmp_path):
    run = _run(tmp_path, keeps=())

    assert attention_curves(run) == {}
    assert learning_curves(run) == {}
    assert reliability(run) is None


def test_learning_curves__loss_that_diverged__has_gaps_which_json_can_hold(tmp_path):
    run = _run(tmp_path, keeps=())
    write_log(run.folder, 0, [(0, 1.0, 0.5), (1, "nan", "inf"), (2, 2.0, 0.5)])

    curves = learning_curves(run)

    assert curves["train/loss"] == [1.0, None, 2.0]
    assert curves["val/loss"] == [0.5, None, 0.5]
    json.dumps(curves, allow_nan=False)


def test_reliability__known_predictions__gives_shares_by_confidence(tmp_path):
    run = _run(tmp_path)
    # Labels 0, 1, 0, 1: sure by .9 and right, right, wrong; sure by .61 and wrong.
    write_predictions(run.folder, [0.1, 0.9, 0.9, 0.39])

    found = reliability(run)

    filled = {9: (0.61, 0.0, 1), 13: (0.9, 0.6667, 3)}
    assert found["n"] == [filled[k][2] if k in filled else 0 for k in range(15)]
    for place, key in enumerate(("confidence", "accuracy")):
        assert found[key] == [filled[k][place] if k in filled else None for k in range(15)]
    assert found["error"] == pytest.approx(1 / 4 * 0.61 + 3 / 4 * (0.9 - 2 / 3), abs=1e-4)


def test_reliability__validation_bags_only__is_none(tmp_path):
    run = _run(tmp_path)
    file = run.folder / "predictions.csv"
    file.write_text(file.read_text().replace(",test,", ",val,"))

    assert reliability(run) is None


@settings(derandomize=True, deadline=None)
@given(st.floats(allow_subnormal=False))
def test_rounded__any_number__keeps_four_digits_or_is_none(value):
    if not math.isfinite(value):
        assert rounded(value) is None
    elif abs(value) < 1e300:
        np.testing.assert_allclose(rounded(value), value, rtol=5.01e-4)
        assert len(repr(rounded(value)).split("e")[0].replace(".", "").strip("-0")) <= 4
