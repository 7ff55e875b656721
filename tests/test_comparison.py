import math

import numpy as np
import pytest
from scipy.stats import ttest_rel, wilcoxon

from mil_anchor.calibration import calibration
from mil_anchor.comparison import (
    PredictionReader,
    compare,
    on_one_machine,
    pair_runs,
    ratio_to_base,
)
from mil_anchor.results import read_runs
from mil_anchor.stats import combine_p_values, delong_test, permutation_test
from tests.run_folders import write_run

NONE = (0.50, 0.60, 0.55, 0.70)
ANCHOR = (0.56, 0.62, 0.54, 0.78)


def _write_seeds(root, plugin, values, **options):
    for seed, value in enumerate(values):
        write_run(root, plugin, seed, f1=value, **options)


def _compared(root, *metrics):
    return compare(pair_runs(read_runs(root)), metrics, reader=PredictionReader("test"))


def _random_predictions(seed, n_bags=12, start=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n_bags) % 2
    drawn = np.clip(0.35 * labels + generator.uniform(0, 0.65, n_bags), 0, 1)
    return [
        (f"b{start + place}", int(label), float(p))
        for place, (label, p) in enumerate(zip(labels, drawn, strict=True))
    ]


def test_compare__pairs_of_seeds__give_the_paired_tests(tmp_path):
    _write_seeds(tmp_path, "none", NONE)
    _write_seeds(tmp_path, "anchor", ANCHOR)
    write_run(tmp_path, "anchor", 9, f1=0.9)  # nothing to be compared with

    (one,) = _compared(tmp_path, "f1")

    assert (one.data, one.model, one.plugin, one.metric) == ("musk1", "abmil", "anchor", "f1")
    assert one.differences == pytest.approx([0.06, 0.02, -0.01, 0.08])
    assert one.test.mean == pytest.approx(0.0375)
    expected = ttest_rel(ANCHOR, NONE).confidence_interval(0.95)
    assert one.test.interval == pytest.approx(tuple(expected))
    # Of 16 ways to flip signs: ++++, ++-+ and their opposites have an absolute sum of .15 or more.
    assert one.sign_flip_p == one.holm_p == 4 / 16
    assert one.test.wilcoxon_p == wilcoxon(np.round(one.differences, 9)).pvalue
    assert one.slides_p is None  # no predictions


def test_compare__single_pair__has_a_difference_and_no_p_value(tmp_path):
    _write_seeds(tmp_path, "none", NONE[:1])
    _write_seeds(tmp_path, "anchor", ANCHOR[:1])

    (one,) = _compared(tmp_path, "f1")

    assert one.differences == pytest.approx([0.06])
    assert math.isnan(one.sign_flip_p)
    assert math.isnan(one.holm_p)


def test_compare__two_data_sets__corrects_within_model_plugin_and_metric(tmp_path):
    for data, values in {"musk1": [0.1] * 5, "musk2": [0.1, 0.1, 0.1, 0.1, -0.1]}.items():
        _write_seeds(tmp_path, "none", [0.5] * 5, data=data)
        _write_seeds(tmp_path, "anchor", [0.5 + value for value in values], data=data)
    _write_seeds(tmp_path, "none", [0.5] * 5, model="dsmil")
    _write_seeds(tmp_path, "anchor", [0.6] * 5, model="dsmil")

    found = {(one.data, one.model): one for one in _compared(tmp_path, "f1")}

    # 2 of 32 flips; 12 of 32 (five with one sign turned, all of one sign, and their opposites).
    assert found["musk1", "abmil"].sign_flip_p == 2 / 32
    assert found["musk1", "abmil"].holm_p == 2 * 2 / 32
    assert found["musk2", "abmil"].holm_p == found["musk2", "abmil"].sign_flip_p == 12 / 32
    assert found["musk1", "dsmil"].holm_p == 2 / 32


def test_compare__metric_of_one_run_only__is_no_pair(tmp_path):
    write_run(tmp_path, "none", f1=0.5, auroc=0.5)
    write_run(tmp_path, "anchor", f1=0.6)

    assert [one.metric for one in _compared(tmp_path, "f1", "auroc")] == ["f1"]


@pytest.mark.parametrize("shared", [True, False])
def test_compare__predictions__combine_tests_over_slides(tmp_path, shared):
    p_auroc, p_f1 = [], []
    for fold in range(3):
        own, base = (
            _random_predictions(10 * fold + which, start=0 if shared else 100 * fold)
            for which in range(2)
        )
        write_run(tmp_path, "anchor", fold=fold, f1=0.5, auroc=0.5, accuracy=0.5, predictions=own)
        shuffled = base[::-1]  # the order of bags in the file does not matter
        write_run(
            tmp_path, "none", fold=fold, f1=0.5, auroc=0.5, accuracy=0.5, predictions=shuffled
        )
        labels = np.array([label for _, label, _ in own])
        a, b = (np.array([p for _, _, p in rows]) for rows in (own, base))
        p_auroc.append(delong_test(labels, a, b).p_value)
        chosen = [(p > 0.5).astype(int) for p in (a, b)]
        p_f1.append(permutation_test(labels, *chosen).p_value)

    auroc, f1, accuracy = _compared(tmp_path, "auroc", "f1", "accuracy")

    assert auroc.slides_p == pytest.approx(combine_p_values(p_auroc, independent=not shared))
    assert f1.slides_p == pytest.approx(combine_p_values(p_f1, independent=not shared))
    assert accuracy.slides_p is None


def test_compare__slides_of_patients__count_patients_as_cases(tmp_path):
    own, base = _random_predictions(0), _random_predictions(1)
    folder = write_run(tmp_path, "anchor", f1=0.5, auroc=0.5, predictions=own)
    write_run(tmp_path, "none", f1=0.5, auroc=0.5, predictions=base)
    patients = {bag: f"patient {index // 3}" for index, (bag, _, _) in enumerate(own)}
    rows = [f"{bag},{label},test,{patients[bag]}" for bag, label, _ in own]
    (folder / "split.csv").write_text("\n".join(["slide_id,label,split,case_id", *rows]))
    ordered = sorted(own)
    labels = np.array([label for _, label, _ in ordered])
    a, b = (np.array([p for _, _, p in sorted(part)]) for part in (own, base))
    groups = [patients[bag] for bag, _, _ in ordered]

    auroc, f1 = _compared(tmp_path, "auroc", "f1")

    expected = delong_test(labels, a, b, groups=groups).p_value
    assert auroc.slides_p == pytest.approx(expected)
    assert auroc.slides_p != pytest.approx(delong_test(labels, a, b).p_value)
    chosen = [(p > 0.5).astype(int) for p in (a, b)]
    assert f1.slides_p == pytest.approx(permutation_test(labels, *chosen, groups=groups).p_value)


@pytest.mark.parametrize("patient", ["shared", "own"])
def test_compare__patient_with_slides_in_two_folds__makes_their_tests_dependent(tmp_path, patient):
    p_values = []
    for fold in range(2):
        own, base = (_random_predictions(10 * fold + i, start=100 * fold) for i in range(2))
        folder = write_run(tmp_path, "anchor", fold=fold, auroc=0.5, predictions=own)
        write_run(tmp_path, "none", fold=fold, auroc=0.5, predictions=base)
        names = [f"p{fold}_{index}" for index in range(len(own))]
        names[0] = "p" if patient == "shared" else names[1]  # of two slides of this fold
        rows = [f"{one[0]},{one[1]},test,{name}" for one, name in zip(own, names, strict=True)]
        (folder / "split.csv").write_text("\n".join(["slide_id,label,split,case_id", *rows]))
        ordered = sorted(zip(own, names, strict=True))
        labels = np.array([one[1] for one, _ in ordered])
        a, b = (np.array([p for _, _, p in sorted(part)]) for part in (own, base))
        p_values.append(delong_test(labels, a, b, groups=[name for _, name in ordered]).p_value)

    (auroc,) = _compared(tmp_path, "auroc")

    expected = combine_p_values(p_values, independent=patient == "own")
    assert auroc.slides_p == pytest.approx(expected)


@pytest.mark.parametrize("change", ["other slides", "other label"])
def test_compare__predictions_of_other_slides__are_no_pair(tmp_path, change, caplog):
    own, base = _random_predictions(0), _random_predictions(1)
    bag_id, label, probability = own[0]
    own[0] = ("z", label, probability) if change == "other slides" else (bag_id, 1, probability)
    for seed, rows in enumerate((own, _random_predictions(2))):
        write_run(tmp_path, "anchor", seed, f1=0.6 + seed / 10, predictions=rows)
        write_run(tmp_path, "none", seed, f1=0.5, predictions=base)

    (one,) = _compared(tmp_path, "f1")

    assert one.differences == pytest.approx([0.2])
    assert "1 pair(s) left out, of other bags" in caplog.text


@pytest.mark.parametrize("change", ["no file", "one class", "broken"])
def test_compare__predictions_that_cannot_be_paired__leave_the_runs_paired(tmp_path, change):
    own, base = _random_predictions(0), _random_predictions(1)
    if change == "one class":
        own, base = ([(bag, 1, p) for bag, _, p in rows] for rows in (own, base))
    folder = write_run(tmp_path, "anchor", auroc=0.6, predictions=own)
    write_run(tmp_path, "none", auroc=0.5, predictions=base)
    if change == "no file":
        (folder / "predictions.csv").unlink()
    elif change == "broken":
        (folder / "predictions.csv").write_text("bag_id,label\na,b\n")

    (one,) = _compared(tmp_path, "auroc")

    assert (one.slides_p, one.n_left_out) == (None, 1)
    assert one.differences == pytest.approx([0.1])


def test_compare__pair_without_variance__leaves_the_others_p_value(tmp_path):
    # One model separates the classes, the other ties them: no bag says how far chance can go.
    labels = [0, 0, 1, 1]
    sure = [(f"s{place}", label, float(label)) for place, label in enumerate(labels)]
    blind = [(bag, label, 0.5) for bag, label, _ in sure]
    rows = [(sure, blind), (_random_predictions(0), _random_predictions(1))]
    for fold, (own, base) in enumerate(rows):
        write_run(tmp_path, "anchor", fold=fold, auroc=0.6, predictions=own)
        write_run(tmp_path, "none", fold=fold, auroc=0.5, predictions=base)

    (one,) = _compared(tmp_path, "auroc")

    bags = np.array([label for _, label, _ in rows[1][0]])
    a, b = (np.array([p for _, _, p in part]) for part in rows[1])
    assert one.slides_p == pytest.approx(delong_test(bags, a, b).p_value)
    assert one.n_left_out == 1


def test_compare__metrics_in_float32__tie_where_they_are_equal(tmp_path):
    # Accuracies on 14 bags: differences of 1, -1 and 2 bags, in float32.
    for seed, (own, base) in enumerate([(10, 9), (8, 9), (11, 9)]):
        for plugin, right in (("anchor", own), ("none", base)):
            accuracy = float(np.float32(right) / np.float32(14))
            write_run(tmp_path, plugin, seed, accuracy=accuracy)

    (one,) = _compared(tmp_path, "accuracy")

    assert len({abs(own) for own in one.differences}) == 3
    # Sums of bags over all flips: 4, 2, 2, 0 and their opposites; 2 was observed.
    assert one.sign_flip_p == 6 / 8
    assert one.test.wilcoxon_p == wilcoxon([1, -1, 2]).pvalue


def test_compare__calibration_error__comes_from_the_predictions(tmp_path):
    expected = []
    for which, plugin in enumerate(("anchor", "none")):
        rows = _random_predictions(which)
        write_run(tmp_path, plugin, predictions=rows)
        probabilities = np.array([[1 - p, p] for _, _, p in rows])
        labels = np.array([label for _, label, _ in rows])
        expected.append(calibration(labels, probabilities).error)

    (one,) = _compared(tmp_path, "calibration_error")

    assert one.differences == pytest.approx([expected[0] - expected[1]])


def test_pair_runs__settings__are_paired_with_the_same_settings(tmp_path):
    for lr in (0.1, 0.2):
        write_run(tmp_path, "none", settings={"module.lr": lr}, f1=lr)
        for weight in (1, 2):
            write_run(tmp_path, "anchor", settings={"module.lr": lr, "plugin.weight": weight})
    write_run(tmp_path, "anchor", settings={"module.lr": 0.3, "plugin.weight": 1})

    pairs = pair_runs(read_runs(tmp_path))

    assert {
        cell[2]: [pair.base.metrics["test/f1"] for pair in own] for cell, own in pairs.items()
    } == {
        f"anchor (module.lr={lr}, plugin.weight={weight})": [lr]
        for lr in (0.1, 0.2)
        for weight in (1, 2)
    }


def test_pair_runs__bases_of_two_sweeps__takes_that_of_the_same_sweep(tmp_path):
    for out, value in (("a", 0.1), ("b", 0.2)):
        write_run(tmp_path / out, "none", settings={"out": out}, f1=value)
    write_run(tmp_path / "b", "anchor", settings={"out": "b"})
    write_run(tmp_path / "c", "slow", settings={"out": "c"})

    pairs = pair_runs(read_runs(tmp_path))

    assert pairs["musk1", "abmil", "anchor"][0].base.metrics["test/f1"] == 0.2
    assert pairs["musk1", "abmil", "slow"][0].base.metrics["test/f1"] == 0.1


def test_pair_runs__site_of_the_plugin__does_not_matter_to_the_run_without(tmp_path):
    write_run(tmp_path, "none")
    write_run(tmp_path, "anchor", settings={"site": "model.attention"})

    assert list(pair_runs(read_runs(tmp_path))) == [("musk1", "abmil", "anchor")]


def test_pair_runs__other_base__is_compared_with(tmp_path):
    write_run(tmp_path, "anchor_nsf", time__epoch_s=2.0)
    write_run(tmp_path, "anchor_entmax", time__epoch_s=3.0)

    pairs = pair_runs(read_runs(tmp_path), base="anchor_nsf")

    assert ratio_to_base(pairs["musk1", "abmil", "anchor_entmax"], "time/epoch_s") == 1.5


def test_ratio_to_base__pairs__is_a_geometric_mean(tmp_path):
    for seed, (own, base) in enumerate([(2.0, 1.0), (1.0, 8.0)]):
        write_run(tmp_path, "anchor", seed, attention__jsd=own)
        write_run(tmp_path, "none", seed, attention__jsd=base)
    write_run(tmp_path, "anchor", 5, attention__jsd=9.0)
    write_run(tmp_path, "none", 5)
    (pairs,) = pair_runs(read_runs(tmp_path)).values()

    assert ratio_to_base(pairs, "attention/jsd") == pytest.approx(0.5)
    assert ratio_to_base(pairs, "attention/entropy") is None


def test_ratio_to_base__zero__has_none(tmp_path):
    write_run(tmp_path, "anchor", attention__jsd=0.0)
    write_run(tmp_path, "none", attention__jsd=1.0)
    (pairs,) = pair_runs(read_runs(tmp_path)).values()

    assert ratio_to_base(pairs, "attention/jsd") is None


def test_on_one_machine__other_processor__is_left_out(tmp_path):
    for seed, processor in enumerate(("x", "y")):
        write_run(tmp_path, "none", seed, environment={"processor": "x", "n_threads": 1})
        environment = {"processor": processor, "n_threads": 1, "commit": "other"}
        write_run(tmp_path, "anchor", seed, environment=environment)
    (pairs,) = pair_runs(read_runs(tmp_path)).values()

    assert [pair.own.draw for pair in on_one_machine(pairs)] == [(0, 0)]


@pytest.mark.parametrize("content", [None, "[]", '{"processor": '])
def test_on_one_machine__unknown_machines__are_left_out(tmp_path, content):
    for plugin in ("none", "anchor"):
        folder = write_run(tmp_path, plugin)
        if content is not None:
            (folder / "environment.json").write_text(content)
    (pairs,) = pair_runs(read_runs(tmp_path)).values()

    assert on_one_machine(pairs) == []
