import pytest

from mil_anchor.published import published
from mil_anchor.reproduction import reproduction_table
from mil_anchor.results import read_runs
from tests.run_folders import write_run

PROTOCOL = {
    "trainer.max_epochs": 50,
    "module.lr": 1e-4,
    "module.weight_decay": 1e-5,
    "hidden": 128,
}


def _rows(root, **wanted):
    table = reproduction_table(read_runs(root))
    titles = [column.title for column in table.columns]
    rows = [dict(zip(titles, row, strict=True)) for row in table.rows]
    return [row for row in rows if all(row[key].text == text for key, text in wanted.items())]


def test_reproduction__no_run_of_it__says_so_for_every_number(tmp_path):
    write_run(tmp_path, model="other", settings={"model._target_": "torch.nn.Linear"}, f1=0.5)

    rows = _rows(tmp_path)

    assert len(rows) == len(published())
    assert all(row["comparable"].text.startswith("not comparable: ") for row in rows)
    assert {row["ours"].text for row in rows} == {"-"}


def test_reproduction__same_data_features_and_protocol__is_comparable(tmp_path):
    settings = {**PROTOCOL, "data.cohort": "bracs"}
    for seed, f1 in enumerate((0.6, 0.7)):
        # Whatever the user calls the data.
        write_run(tmp_path, seed=seed, data="mine", settings=settings, f1=f1, in_features=384)

    (row,) = _rows(tmp_path, data="bracs", method="ABMIL", quantity="F1")

    assert row["comparable"].text == "yes"
    assert (row["paper"].value, row["ours"].text, row["n"].text) == (0.68, ".650±.071", "2")
    assert row["our runs"].text == "mine, abmil, none"


@pytest.mark.parametrize(
    ("change", "width", "reason"),
    [
        ({"module.lr": 1e-3}, 384, "module.lr 0.001, the paper's 0.0001"),
        ({"hidden": 512}, 384, "hidden 512, the paper's 128"),
        ({}, 1024, "features of width 1024, the paper's of 384"),
        ({}, None, "features of unknown width, the paper's of 384"),
    ],
)
def test_reproduction__other_features_or_protocol__is_not_comparable(
    tmp_path, change, width, reason
):
    known = {} if width is None else {"in_features": width}
    write_run(tmp_path, data="bracs", settings={**PROTOCOL, **change}, f1=0.6, **known)

    (row,) = _rows(tmp_path, data="bracs", method="ABMIL", quantity="F1")

    assert row["comparable"].text == f"not comparable: {reason}"
    assert row["ours"].text == ".600"


def test_reproduction__nothing_set_where_the_protocol_has_a_number__is_said(tmp_path):
    settings = {
        "model._target_": "baselines.asmil.ASMIL",
        "trainer.max_epochs": None,
        "module.lr": 5e-4,
        "plugin.decay": 0.999,
        "data.n_folds": None,
    }
    write_run(tmp_path, "anchor_nsf", settings=settings, accuracy=0.9)

    (row,) = _rows(tmp_path, data="musk1")

    expected = "not comparable: trainer.max_epochs null, the paper's 40"
    assert row["comparable"].text == expected


def test_reproduction__some_folds_of_a_classic_set__are_not_the_whole(tmp_path):
    settings = {
        "model._target_": "baselines.asmil.ASMIL",
        "trainer.max_epochs": 40,
        "module.lr": 5e-4,
        "plugin.decay": 0.999,
    }
    for fold in range(3):
        write_run(tmp_path, "anchor_nsf", fold=fold, settings=settings, accuracy=0.9)

    (row,) = _rows(tmp_path, data="musk1")

    assert row["comparable"].text == "not comparable: 3 of 10 folds"
    assert row["n"].value == 3


def test_reproduction__ratio_on_other_data__stands_beside_and_is_not_comparable(tmp_path):
    for plugin, seconds in (("none", 1.0), ("anchor_nsf", 1.5)):
        write_run(tmp_path, plugin, time__epoch_s=seconds, environment={"processor": "a Xeon"})

    (row,) = _rows(tmp_path, method="ABMIL with anchor", quantity="s/epoch, ratio")
    (bare,) = _rows(tmp_path, method="ABMIL", quantity="s/epoch")

    assert (row["paper"].value, row["ours"].text) == (1.23, "1.50")
    assert row["comparable"].text == (
        "not comparable: on musk1, the paper's on bracs; on a Xeon, the paper's on RTX 5000"
    )
    assert bare["comparable"].text == "not comparable: no run of it on bracs"


def test_reproduction__cost_on_the_papers_data_and_gpu__is_comparable(tmp_path):
    for plugin, seconds in (("none", 1.0), ("anchor_nsf", 1.25)):
        environment = {"gpu": "Quadro RTX 5000", "processor": "x"}
        write_run(tmp_path, plugin, data="bracs", time__epoch_s=seconds, environment=environment)

    (row,) = _rows(tmp_path, method="ABMIL with anchor", quantity="s/epoch, ratio")
    (bare,) = _rows(tmp_path, method="ABMIL", quantity="s/epoch")

    assert (row["ours"].text, row["comparable"].text) == ("1.25", "yes")
    assert (bare["ours"].text, bare["comparable"].text) == ("1.000", "yes")


def test_reproduction__costs_on_several_machines__names_the_others(tmp_path):
    machines = ("Quadro RTX 5000", "H100", "A100")
    for seed, gpu in enumerate(machines):
        for plugin in ("none", "anchor_nsf"):
            # The last pair lies on two machines, so its ratio does not count.
            own = {"gpu": "V100" if (plugin, gpu) == ("none", "A100") else gpu}
            measured = {"data": "bracs", "time__epoch_s": 1.0, "environment": own}
            write_run(tmp_path, plugin, seed, **measured)
    for plugin in ("none", "anchor_nsf"):
        write_run(tmp_path, plugin, 3, data="bracs", environment={"gpu": "T4"})

    (row,) = _rows(tmp_path, method="ABMIL with anchor", quantity="s/epoch, ratio")
    (bare,) = _rows(tmp_path, method="ABMIL", quantity="s/epoch")

    assert (row["ours"].text, row["n"].text) == ("1.00", "2")
    assert row["comparable"].text == "not comparable: on H100, the paper's on RTX 5000"
    assert (bare["ours"].text, bare["n"].text) == ("1.000±.000", "3")
    assert bare["comparable"].text == "not comparable: on H100, V100, the paper's on RTX 5000"


def test_reproduction__sweep__has_a_line_for_each_setting(tmp_path):
    for weight in (0.1, 0.2):
        settings = {"plugin.weight": weight, "data.cohort": "bracs"}
        write_run(tmp_path, "anchor_nsf", settings=settings, f1=weight)

    rows = _rows(tmp_path, method="ABMIL +Anchor+NSF")

    assert [row["ours"].text for row in rows] == [".100", ".200"]
