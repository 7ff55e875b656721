import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mil_anchor.data.labels import (
    LabelTable,
    part_name,
    read_labels,
    slide_name,
    table_of_rows,
    tcga_patient,
)


def _write(folder, content, name="labels.csv"):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def _table(**change):
    fields = {
        "slide_ids": ["a", "b"],
        "labels": [0, 1],
        "classes": ["n", "t"],
        "cases": ["p", "q"],
        "parts": [None, "train"],
    }
    return LabelTable(**{**fields, **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": [0]}, "one entry per slide in every list, but the lengths .*'labels': 1"),
        (
            {"slide_ids": [], "labels": [], "cases": [], "parts": []},
            "must hold slides, .*'slide_ids': 0",
        ),
        ({"slide_ids": ["a", ""]}, "must neither be empty .* but '' came"),
        ({"cases": ["p", " q"]}, "begin or end with a space, but ' q' came"),
        ({"classes": ["n", "n"]}, r"Every class must come once, but \['n'\] come twice"),
        ({"labels": [0, 2]}, r"must lie in 0\.\.1, but slide 'b' has 2"),
        ({"labels": [-1, 1]}, r"must lie in 0\.\.1, but slide 'a' has -1"),
        ({"parts": [None, "valid"]}, "slide 'b' has 'valid'"),
        (
            {"slide_ids": ["a", "a"]},
            "Every slide must come once, but 1 come more often: 'a' 2 times with label n and t",
        ),
    ],
)
def test_label_table__inconsistent__is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        _table(**change)


def test_read_labels__clam_table__keeps_ids_and_cases_as_text(tmp_path):
    path = _write(tmp_path, "case_id,slide_id,label\n007,001,tumor\n007,1,normal\n8,2.0,tumor\n")
    assert read_labels(path) == LabelTable(
        slide_ids=["001", "1", "2.0"],
        labels=[1, 0, 1],
        classes=["normal", "tumor"],
        cases=["007", "007", "8"],
        parts=[None, None, None],
    )


def test_read_labels__plain_table_as_excel_writes_it__is_read(tmp_path):
    content = "\ufeffslide_id, label ,split\r\na , t,Training\r\nb,n,valid\r\nc,n,TEST\r\nd,t,\r\n"
    table = read_labels(_write(tmp_path, content))
    assert table.slide_ids == ["a", "b", "c", "d"]
    assert [table.classes[label] for label in table.labels] == ["t", "n", "n", "t"]
    assert table.parts == ["train", "val", "test", None]
    assert table.cases == table.slide_ids


def test_read_labels__patho_bench_table__takes_the_named_task(tmp_path):
    content = "case_id\tslide_id\tgrade\tfold_0\n01\t001\t2\ttrain\n01\t002\t0\ttest\n"
    path = _write(tmp_path, content, "k=all.tsv")
    table = read_labels(path, label="grade")
    assert (table.slide_ids, table.labels, table.cases) == (["001", "002"], [1, 0], ["01", "01"])
    assert table.classes == ["0", "2"]
    with pytest.raises(ValueError, match=r"lacks \['label'\] and has \['case_id', 'slide_id', 'gr"):
        read_labels(path)
    _write(tmp_path, "task_col: grade\nmetrics: [bacc]\n", "config.yaml")
    assert read_labels(path) == table


def test_read_labels__config_of_another_kind__is_passed_over(tmp_path):
    path = _write(tmp_path, "slide_id,grade\na,0\n")
    _write(tmp_path, "model: abmil\n", "config.yaml")
    with pytest.raises(ValueError, match=r"lacks \['label'\]"):
        read_labels(path)
    _write(tmp_path, "- a list\n", "config.yaml")
    with pytest.raises(ValueError, match=r"lacks \['label'\]"):
        read_labels(path)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=30))
def test_read_labels__integers__are_ordered_by_value(tmp_path_factory, labels):
    rows = "".join(f"s{index},{label}\n" for index, label in enumerate(labels))
    table = read_labels(_write(tmp_path_factory.mktemp("t"), f"slide_id,label\n{rows}"))
    assert [int(table.classes[label]) for label in table.labels] == labels
    assert sorted(int(name) for name in table.classes) == [int(name) for name in table.classes]
    if set(labels) == set(range(max(labels) + 1)):
        assert table.labels == labels


def test_read_labels__integers_that_pandas_made_floats__stay_integers(tmp_path):
    table = read_labels(_write(tmp_path, "slide_id,label\na,1.0\nb,10.0\nc,2\nd,01\n"))
    assert table.classes == ["1", "2", "10"]
    assert table.labels == [0, 2, 1, 0]


def test_read_labels__classes_as_list__give_the_order(tmp_path):
    path = _write(tmp_path, "slide_id,label\na,tumor\nb,normal\n")
    assert read_labels(path, classes=["tumor", "normal", "other"]).labels == [0, 1]
    numbers = _write(tmp_path, "slide_id,label\na,2\nb,1\n", "numbers.csv")
    assert read_labels(numbers, classes=OmegaConf.create([0, 1, 2])).labels == [2, 1]
    assert read_labels(numbers, classes=["00", "1.0", "02"]).classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ({"N": "benign", "PB": "benign", "IC": "malignant"}, ["benign", "malignant"]),
        ({"IC": "malignant", "N": "benign", "PB": "benign"}, ["malignant", "benign"]),
        ({"N": 0, "PB": 0, "IC": 1}, ["N+PB", "IC"]),
        ({"IC": 0, "N": 1, "PB": 1}, ["IC", "N+PB"]),
        (OmegaConf.create({"N": 0, "PB": 0, "IC": 1}), ["N+PB", "IC"]),
    ],
)
def test_read_labels__classes_as_mapping__join_labels(tmp_path, classes, names):
    table = read_labels(_write(tmp_path, "slide_id,label\na,N\nb,PB\nc,IC\n"), classes=classes)
    assert table.classes == names
    assert table.labels[0] == table.labels[1] == 1 - table.labels[2]
    assert "N" in names[table.labels[0]] or names[table.labels[0]] == "benign"


@pytest.mark.parametrize(
    ("content", "classes", "match"),
    [
        ("slide,label\na,0\n", None, r"lacks \['slide_id'\] and has \['slide', 'label'\]"),
        ("slide_id\na\n", None, r"lacks \['label'\]"),
        ("slide_id,label\n", None, "needs a header and a row"),
        ("slide_id,label\na,0\nb,\nc,NaN\n", None, r"is empty for 2 slides: \['b', 'c'\]"),
        ("slide_id,label\na,x\nb,y\n", ["x"], r"one of \['x'\], but .*'y' \(slide 'b'\)"),
        ("slide_id,label\na,x\nb,z\n", {"x": 0, "y": 1}, r"'z' \(slide 'b'\)"),
        ("slide_id,label\na,x\n", ["x", "x"], r"class must come once, but \['x'\]"),
        ("slide_id,label\na,x\n", {"x": 1, "y": 2}, r"indices 0, 1, \.\.\. .* but \[1, 2\] came"),
        ("slide_id,label\na,x\n", {"x": 0, "y": "b"}, r"but \[0, 'b'\] came"),
        ("slide_id,label\na,x\na,x\n", None, "'a' 2 times with label x. Keep"),
        ("slide_id,label\na,x\na,y\n", None, "'a' 2 times with label x and y"),
        ("slide_id,label\na.svs,x\na.h5,x\n", None, "'a' 2 times"),
        ("slide_id,label\n,x\n", None, "must neither be empty"),
        (
            "slide_id,label,split\na,x,holdout\n",
            None,
            "'training', .*but 'holdout' came for slide 'a' in .*labels.csv",
        ),
    ],
)
def test_read_labels__broken_table__is_refused(tmp_path, content, classes, match):
    with pytest.raises(ValueError, match=match):
        read_labels(_write(tmp_path, content), classes=classes)


def test_read_labels__tcga_slides__take_patients_as_cases_among_others_too(tmp_path):
    ids = ["TCGA-A1-A0SB-01Z-00-DX1.9f2c.svs", "TCGA-A1-A0SB-01Z-00-DX2.11aa.svs"]
    rows = "".join(f"{name},x\n" for name in ids)
    table = read_labels(_write(tmp_path, f"slide_id,label\n{rows}"))
    assert table.slide_ids == [name.removesuffix(".svs") for name in ids]
    assert table.cases == ["TCGA-A1-A0SB"] * 2
    mixed = read_labels(_write(tmp_path, f"slide_id,label\n{rows}other,x\n"))
    assert mixed.cases == ["TCGA-A1-A0SB", "TCGA-A1-A0SB", "other"]


def test_table_of_rows__ids_of_a_store__are_not_cut():
    table = table_of_rows([{"slide_id": "a.svs", "label": "3"}], "a store", classes=[3, 4])
    assert (table.slide_ids, table.classes) == (["a.svs"], ["3", "4"])


def test_read_labels__case_column__beats_the_rule_and_gaps_are_filled(tmp_path):
    rows = "TCGA-A1-A0SB-01,x,p\nTCGA-A1-A0SC-01,x,\n"
    table = read_labels(_write(tmp_path, f"slide_id,label,case_id\n{rows}"))
    assert table.cases == ["p", "TCGA-A1-A0SC"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a.svs", "a"),
        ("a.b.TIFF", "a.b"),
        ("a.h5", "a"),
        ("a.svs.h5", "a.svs"),
        ("TCGA-A1-A0SB-01Z-00-DX1.9f2c-33", "TCGA-A1-A0SB-01Z-00-DX1.9f2c-33"),
        ("2.0", "2.0"),
        ("asvs", "asvs"),
    ],
)
def test_slide_name__text__loses_one_known_suffix(text, name):
    assert slide_name(text) == name


def test_part_name__words__are_normalised():
    assert [part_name(word) for word in ("Train", "validation", "testing", "")] == [
        "train",
        "val",
        "test",
        None,
    ]


@pytest.mark.parametrize("name", ["TCGA-A1", "XTCGA-A1-A0SB-01", "TCGA-A1-A0SBX", "tumor_001"])
def test_tcga_patient__other_name__is_none(name):
    assert tcga_patient(name) is None


def test_tcga_patient__barcode__is_its_first_three_fields():
    assert (
        tcga_patient("TCGA-A1-A0SB") == tcga_patient("TCGA-A1-A0SB-01A-01-TSA.x") == "TCGA-A1-A0SB"
    )
