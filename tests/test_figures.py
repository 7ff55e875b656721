import csv
import json
import sys
from statistics import fmean

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex

from mil_anchor.__main__ import main
from mil_anchor.callbacks.monitor import AttentionRow
from mil_anchor.experiment import run as run_experiment
from mil_anchor.figures import (
    FIGURES,
    concentration_figure,
    draw_figures,
    jsd_figure,
    reliability_figure,
    targets_figure,
    tsne_figure,
)
from mil_anchor.figures.embedding import shown_epochs
from mil_anchor.figures.style import COLORS, line_styles
from mil_anchor.figures.targets import relative_targets
from mil_anchor.module import Prediction
from mil_anchor.predictions import write_predictions
from mil_anchor.rebuilt import rebuild, validation_scores
from mil_anchor.results import Run, read_runs
from mil_anchor.targets import SoftmaxTarget, as_target
from tests.composing import composed

N_EPOCHS, N_BAGS = 4, 11


def _write_run(root, *, plugin="none", data="musk1", model="abmil", seed=0, rows=None):
    """A run with random measures, which depend on its name, or with the rows given."""
    folder = root / data / model / plugin / str(seed)
    folder.mkdir(parents=True)
    metrics = {"model": model, "plugin": plugin, "data": data, "seed": seed, "fold": 0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    generator = np.random.default_rng([len(plugin), len(data), len(model), seed])
    if rows is None:
        rows = []
        for epoch in range(N_EPOCHS):
            for bag in range(N_BAGS):
                values = generator.uniform(size=5).tolist()
                moved = values[0] if epoch else None
                rows.append(
                    AttentionRow(epoch, f"b{bag}", "online", moved, None, *values[2:], None)
                )
    with (folder / "attention.csv").open("w", newline="") as file:
        csv.writer(file).writerows([AttentionRow._fields, *rows])
    return Run(folder, metrics)


def _write_features(run, *, n_epochs=5, n_bags=8, width=6):
    folder = run.folder / "bag_features"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for epoch in range(n_epochs):
        np.savez(
            folder / f"{epoch}.npz",
            bag_id=np.array([f"b{bag}" for bag in range(n_bags)]),
            label=np.arange(n_bags) % 2,
            features=generator.normal(size=(n_bags, width)).astype(np.float16),
        )


def _lines(axis):
    return {line.get_label(): line for line in axis.lines}


def _bands(axis):
    """Lower and upper edge of each band, by epoch."""
    edges = []
    for band in axis.collections:
        assert isinstance(band, PolyCollection)
        points = band.get_paths()[0].vertices
        of_epochs = {x: points[points[:, 0] == x, 1] for x in np.unique(points[:, 0])}
        edges.append([(y.min(), y.max()) for y in of_epochs.values()])
    return edges


def _naive(runs, column, epoch):
    """The values of all bags of each run in an epoch, read by hand."""
    of_runs = []
    for run in runs:
        with (run.folder / "attention.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["epoch"]) == epoch]
        of_runs.append([float(row[column]) for row in rows if row[column]])
    return of_runs


@pytest.mark.parametrize(
    ("draw", "row", "column", "first"),
    [
        (jsd_figure, 0, "jsd", 1),
        (concentration_figure, 0, "entropy", 0),
        (concentration_figure, 1, "top1pct", 0),
        (concentration_figure, 2, "top10", 0),
    ],
)
def test_curves__line_and_bands__are_mean_runs_and_bags_of_the_csv(
    tmp_path, draw, row, column, first
):
    runs = [_write_run(tmp_path, seed=seed) for seed in range(3)]

    axis = draw(runs).axes[row]

    epochs = list(range(first, N_EPOCHS))
    of_epochs = [_naive(runs, column, epoch) for epoch in epochs]
    means = [[fmean(own) for own in of_runs] for of_runs in of_epochs]
    (line,) = axis.lines
    assert list(line.get_xdata()) == epochs
    assert list(line.get_ydata()) == pytest.approx([fmean(own) for own in means])
    of_runs, of_bags = _bands(axis)
    np.testing.assert_allclose(of_runs, [(min(own), max(own)) for own in means])
    expected = [np.percentile([v for own in of_run for v in own], [10, 90]) for of_run in of_epochs]
    np.testing.assert_allclose(of_bags, expected)


def test_curves__several_cells__have_a_row_per_data_set_and_a_column_per_model(tmp_path):
    for data in ("musk1", "ucsb"):
        for model in ("abmil", "dsmil"):
            for plugin in ("anchor", "none"):
                if (data, model, plugin) != ("ucsb", "dsmil", "anchor"):
                    _write_run(tmp_path, data=data, model=model, plugin=plugin)

    figure = jsd_figure(read_runs(tmp_path))

    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"{m} on {d}" for d in ("musk1", "ucsb") for m in ("abmil", "dsmil")]
    assert [list(_lines(axis)) for axis in figure.axes] == [["none", "anchor"]] * 3 + [["none"]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "none",
        "anchor",
        "lowest to highest run",
        "10 to 90 % of bags",
    ]
    anchor = [_lines(axis)["anchor"].get_color() for axis in figure.axes[:3]]
    assert len(set(anchor)) == 1
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "JSD to previous epoch (nats)"
    assert figure.axes[2].get_xlabel() == "epoch"


def test_curves__runs_of_unequal_length__are_averaged_over_those_that_got_so_far(tmp_path):
    rows = [AttentionRow(e, "b", "online", 0.5, None, 0.5, 0.5, 0.5, None) for e in range(2)]
    short = _write_run(tmp_path, seed=1, rows=rows[:1])
    whole = _write_run(tmp_path, seed=2, rows=[rows[0]._replace(entropy=0.7), rows[1]])

    (line,) = concentration_figure([short, whole]).axes[0].lines

    assert list(line.get_ydata()) == pytest.approx([0.6, 0.5])


def test_curves__attention_that_stands_still__is_drawn_at_the_rounding(tmp_path):
    row = AttentionRow(1, "b", "online", 0.0, None, 0.5, 0.5, 0.5, None)

    (line,) = jsd_figure([_write_run(tmp_path, rows=[row])]).axes[0].lines

    assert list(line.get_ydata()) == [1e-7]


@pytest.mark.parametrize("draw", [jsd_figure, concentration_figure])
def test_curves__nothing_measured__says_so(tmp_path, draw):
    silent = _write_run(tmp_path, rows=[])
    without = _write_run(tmp_path, seed=1)
    (without.folder / "attention.csv").unlink()

    with pytest.raises(ValueError, match=r"must have measured the .* none of 2 run\(s\) has"):
        draw([silent, without])


def test_styles__more_lines_than_colours__differ_in_dashes():
    styles = line_styles([str(index) for index in range(4 * len(COLORS))])

    assert len(set(styles.values())) == len(styles)
    assert styles["0"] == ("#000000", "solid")


def test_tsne__runs_with_features__are_drawn_once_per_cell_in_one_plane(tmp_path):
    runs = [_write_run(tmp_path, plugin=p, seed=s) for p in ("none", "anchor") for s in (0, 1)]
    for run in runs[1:]:
        _write_features(run)

    figure = tsne_figure(runs)

    rows = [figure.axes[:5], figure.axes[5:]]
    assert [row[0].get_ylabel() for row in rows] == [
        "abmil, none\nmusk1, seed 1",
        "abmil, anchor\nmusk1, seed 0",
    ]
    assert [axis.get_title() for axis in rows[0]] == [f"epoch {epoch}" for epoch in range(5)]
    assert len({axis.get_xlim() for axis in rows[0]}) == 1
    for axis in rows[0]:
        clouds = [own for own in axis.collections if isinstance(own, PathCollection)]
        assert [cloud.get_label() for cloud in clouds] == ["0", "1"]
        assert [len(cloud.get_offsets()) for cloud in clouds] == [4, 4]
        assert len({to_hex(cloud.get_facecolor()[0][:3]) for cloud in clouds}) == 2


def test_tsne__same_features__are_placed_as_scikit_learn_does_it(tmp_path):
    from sklearn.manifold import TSNE

    run = _write_run(tmp_path)
    _write_features(run)
    files = [np.load(run.folder / "bag_features" / f"{epoch}.npz") for epoch in range(5)]
    features = np.concatenate([file["features"] for file in files]).astype(np.float32)
    expected = TSNE(perplexity=30, random_state=0).fit_transform(features).reshape(5, 8, 2)

    for axis, placed in zip(tsne_figure([run]).axes, expected, strict=True):
        for label, cloud in enumerate(axis.collections):
            np.testing.assert_allclose(cloud.get_offsets(), placed[label::2])


@pytest.mark.parametrize(
    ("n_epochs", "shown"),
    [
        (1, [0]),
        (3, [0, 1, 2]),
        (5, [0, 1, 2, 3, 4]),
        (9, [0, 2, 4, 6, 8]),
        (50, [0, 12, 24, 37, 49]),
    ],
)
def test_tsne__epochs__are_the_first_the_last_and_evenly_between(n_epochs, shown):
    assert shown_epochs(n_epochs) == shown


def test_tsne__fewer_epochs_than_panels__leaves_the_others_empty(tmp_path):
    run = _write_run(tmp_path)
    _write_features(run, n_epochs=2, n_bags=20)

    axes = tsne_figure([run]).axes

    assert [axis.axison for axis in axes] == [True, True, False, False, False]


def test_tsne__too_few_bags_or_none__says_so(tmp_path):
    run = _write_run(tmp_path)
    with pytest.raises(ValueError, match=r"none of 1 run\(s\) .* bag_features=true"):
        tsne_figure([run])
    _write_features(run, n_epochs=5, n_bags=6)
    with pytest.raises(ValueError, match=r"perplexity of 30 needs more points .* have \[30\]"):
        tsne_figure([run])


def test_tsne__no_scikit_learn__says_what_to_install(tmp_path, monkeypatch):
    run = _write_run(tmp_path)
    _write_features(run)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[figures\]'"):
        tsne_figure([run])
    monkeypatch.delitem(FIGURES, "concentration")
    drawn = draw_figures([run], tmp_path / "out")
    assert "scikit-learn" in drawn.missing["tsne"]
    assert [file.name for file in drawn.files] == ["jsd.png", "jsd.svg"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two real runs: one with an anchor and one without."""
    root = tmp_path_factory.mktemp("runs")
    for plugin in ("none", "anchor_nsf"):
        run_experiment(
            composed(
                "model=abmil",
                f"plugin={plugin}",
                "data=ucsb_breast",
                "hidden=16",
                "trainer.max_epochs=2",
                "trainer.enable_progress_bar=false",
                folder=root / plugin,
            )
        )
    return root


def _counts(axis):
    return {patch.get_label(): patch.get_data() for patch in axis.patches}


def test_targets__run_with_an_anchor__are_histograms_of_its_scores(trained):
    figure = targets_figure(read_runs(trained))

    (axis,) = figure.axes
    assert axis.get_title() == "abmil on ucsb_breast\nanchor_nsf, seed 0: anchor scores"
    assert axis.get_xscale() == "log"
    scores = validation_scores(rebuild(trained / "anchor_nsf"))
    assert scores.source == "anchor"
    drawn = _counts(axis)
    assert list(drawn) == ["softmax", "softmax, temperature 2", "NSF", "NSF, centred"]
    # A histogram by hand: how many of all values lie between two edges.
    nsf = []
    for bag in scores.of_bags:
        sigmoid = 1 / (1 + np.exp(-bag.double().numpy()))
        nsf.append((sigmoid / sigmoid.sum(axis=-1, keepdims=True) * bag.shape[-1]).ravel())
    values = np.concatenate(nsf)
    counts, edges, _ = drawn["NSF"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        assert count * len(values) == pytest.approx(
            ((values >= low) & (values < high)).sum(), abs=1
        )
    for counts, _, _ in drawn.values():
        assert counts.sum() == pytest.approx(1)


def test_targets__run_without_an_anchor__takes_the_online_scores(trained):
    figure = targets_figure(read_runs(trained / "none"))

    assert figure.axes[0].get_title().endswith("none, seed 0: online scores")


def test_relative_targets__padding_and_rows__count_real_instances_only():
    scores = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 2.0, 2.0]])

    values = relative_targets([scores], SoftmaxTarget())

    e = np.e
    np.testing.assert_allclose(values, [2 / (1 + e), 2 * e / (1 + e), 1, 1, 1], rtol=1e-6)
    assert len(relative_targets([scores, scores], as_target("nsf"))) == 10


def test_targets__data_gone__says_so_and_other_figures_are_drawn(
    trained, tmp_path, caplog, monkeypatch
):
    gone = tmp_path / "gone"
    for name in ("config.yaml", "metrics.json", "attention.csv", "checkpoints/best.ckpt"):
        file = gone / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((trained / "none" / name).read_bytes())
    config = gone / "config.yaml"
    config.write_text(config.read_text().replace("name: ucsb_breast", "name: lost"))

    monkeypatch.delitem(FIGURES, "concentration")
    drawn = draw_figures(read_runs(gone), tmp_path / "out")

    assert "'lost' came" in drawn.missing["targets"]
    assert [file.name for file in drawn.files] == ["jsd.png", "jsd.svg"]
    # Beside a run that can be built anew it is a warning.
    metrics = json.loads((gone / "metrics.json").read_text())
    (gone / "metrics.json").write_text(json.dumps({**metrics, "model": "other"}))
    figure = targets_figure([*read_runs(trained), *read_runs(gone)])
    assert len([axis for axis in figure.axes if axis.axison]) == 1
    assert "'lost' came" in caplog.text


def _write_probabilities(run, probabilities, *, labels=None, part="test"):
    """Of class 1, of bags of class 1 unless labels are given."""
    rows = [
        (part, Prediction(f"b{index}", 1 if labels is None else labels[index], [1 - own, own]))
        for index, own in enumerate(probabilities)
    ]
    write_predictions(run.folder / "predictions.csv", rows)


def test_reliability__lines_and_shares__are_means_over_runs_of_each_bin(tmp_path):
    runs = [_write_run(tmp_path, seed=seed) for seed in range(3)]
    # Bins of a fifteenth: 0.9 lies in the 14th, 0.95 and 0.99 in the 15th, 0.7 in the 11th.
    _write_probabilities(runs[0], [0.9, 0.9, 0.1, 0.99])
    _write_probabilities(runs[1], [0.95, 0.99])
    _write_probabilities(runs[2], [0.7, 0.9], part="val")

    curve, share = reliability_figure(runs).axes

    assert curve.get_title() == "abmil on musk1\n2 runs of each plug-in"
    line = _lines(curve)["none"]
    # Two of three at 0.9 are right; those above are right, in both runs.
    assert list(line.get_xdata()) == pytest.approx([0.9, (0.99 + 0.97) / 2])
    assert list(line.get_ydata()) == pytest.approx([2 / 3, 1])
    (stairs,) = share.patches
    counts, edges, _ = stairs.get_data()
    np.testing.assert_allclose(edges, np.linspace(0, 1, 16))
    np.testing.assert_allclose(counts, [0] * 13 + [3 / 8, 1 / 8 + 1 / 2])
    diagonal = curve.lines[-1]
    assert (list(diagonal.get_xdata()), list(diagonal.get_ydata())) == ([0, 1], [0, 1])


def test_reliability__several_cells__have_panels_per_data_set_and_model(tmp_path):
    generator = np.random.default_rng(0)
    for data, model, plugin, n_runs in (
        ("musk1", "abmil", "anchor", 3),
        ("musk1", "abmil", "none", 1),
        ("musk1", "dsmil", "none", 1),
        ("ucsb", "abmil", "none", 1),
    ):
        for seed in range(n_runs):
            run = _write_run(tmp_path, data=data, model=model, plugin=plugin, seed=seed)
            labels = generator.integers(0, 2, size=9).tolist()
            _write_probabilities(run, generator.uniform(size=9).tolist(), labels=labels)

    figure = reliability_figure(read_runs(tmp_path))

    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == [
        "abmil on musk1\n1 to 3 runs of each plug-in",
        "dsmil on musk1\n1 run of each plug-in",
        "abmil on ucsb\n1 run of each plug-in",
    ]
    assert [axis.axison for axis in figure.axes] == [True] * 5 + [False, True, False]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["none", "anchor", "calibrated"]


def test_reliability__no_test_bags_predicted__says_so(tmp_path):
    runs = [_write_run(tmp_path, seed=seed) for seed in range(2)]
    _write_probabilities(runs[0], [0.3], part="val")
    with pytest.raises(ValueError, match=r"must have predicted test bags .* none of 2 run\(s\)"):
        reliability_figure(runs)


def test_draw_figures__runs__writes_png_and_svg_of_each(trained, tmp_path):
    runs = read_runs(trained)
    _write_features(runs[0])

    drawn = draw_figures(runs, tmp_path / "new" / "folder")

    assert drawn.missing == {}
    assert [file.name for file in drawn.files] == [
        f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")
    ]
    for file in drawn.files:
        start = file.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") or b"<?xml" in start


def test_draw_figures__runs_without_data__says_why_for_each(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)have none.*jsd:.*tsne:.*targets:.*reliability:"):
        draw_figures([_write_run(tmp_path, rows=[])], tmp_path / "out")


def test_figures__no_matplotlib__says_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("mil_anchor.figures")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[figures\]'"):
        __import__("mil_anchor.figures")


def test_command_line__one_folder__writes_into_it(tmp_path, capsys):
    _write_run(tmp_path)

    assert main(["figures", str(tmp_path)]) == 0

    said = capsys.readouterr().out
    for name in ("jsd.png", "jsd.svg", "concentration.png", "concentration.svg"):
        assert f"Wrote {tmp_path / name}\n" in said
        assert (tmp_path / name).exists()
    assert "No tsne: t-SNE needs the bag features" in said
    assert "No targets: " in said


@pytest.fixture
def only_jsd(monkeypatch):
    for name in FIGURES.keys() - {"jsd"}:
        monkeypatch.delitem(FIGURES, name)


def test_command_line__several_folders__writes_into_what_holds_them_all(
    tmp_path, only_jsd, monkeypatch
):
    runs = [_write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    given = []
    monkeypatch.setitem(FIGURES, "jsd", lambda own: given.extend(own) or jsd_figure(own))

    # The second is named twice, as a run and as what holds it.
    assert main(["figures", str(tmp_path / "one"), str(runs[1].folder), str(tmp_path / "two")]) == 0

    assert sorted(run.folder for run in given) == sorted(run.folder for run in runs)
    assert (tmp_path / "jsd.png").exists()
    assert not (tmp_path / "one" / "jsd.png").exists()


def test_command_line__out__is_where_figures_are_written(tmp_path, only_jsd):
    run = _write_run(tmp_path / "runs")

    assert main(["figures", str(run.folder), "--out", str(tmp_path / "drawn")]) == 0

    assert (tmp_path / "drawn" / "jsd.svg").exists()
    assert not (run.folder / "jsd.png").exists()


def test_command_line__no_run__says_so_and_exits_with_1(tmp_path, capsys):
    assert main(["figures", str(tmp_path)]) == 1
    assert "must hold complete runs" in capsys.readouterr().err
