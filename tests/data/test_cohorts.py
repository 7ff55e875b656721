from collections import Counter
from pathlib import Path

import pytest

from mil_anchor.data.cohorts import COHORTS, bracs, camelyon16, camelyon17
from mil_anchor.data.splits import check_split, split_by_parts

SEVEN = {
    "N": "benign",
    "PB": "benign",
    "UDH": "benign",
    "FEA": "atypical",
    "ADH": "atypical",
    "DCIS": "malignant",
    "IC": "malignant",
}


def _write(folder, name, content):
    path = folder / name
    path.write_text(content)
    return path


def _without_files(slide_ids):
    return dict.fromkeys(slide_ids)


def _label_of(table):
    return {
        name: table.classes[label]
        for name, label in zip(table.slide_ids, table.labels, strict=True)
    }


def _part_of(table):
    return dict(zip(table.slide_ids, table.parts, strict=True))


def test_camelyon16__all_slides__give_the_published_sizes(tmp_path):
    trained = [f"normal_{i:03d}" for i in range(1, 160)] + [f"tumor_{i:03d}" for i in range(1, 112)]
    tested = [f"test_{i:03d}" for i in range(1, 130)]
    # The official table has no header, and repeats a word in its rows.
    rows = [
        f"{name},Tumor,IDC,Macro" if index % 3 == 0 else f"{name},Normal,None,None"
        for index, name in enumerate(tested)
    ]
    reference = _write(tmp_path, "reference.csv", "\n".join(rows))
    table = camelyon16(_without_files(tested + trained), reference)
    assert table.classes == ["normal", "tumor"]
    assert Counter(_label_of(table)[name] for name in trained) == {"normal": 159, "tumor": 111}
    assert [_label_of(table)[name] for name in tested] == ["tumor", "normal", "normal"] * 43
    drawn = set()
    for seed in range(5):
        split = split_by_parts(table, val_fraction=0.1, seed=seed)
        assert (len(split.train), len(split.val), len(split.test)) == (243, 27, 129)
        assert {table.slide_ids[index] for index in split.test} == set(tested)
        assert sum(table.labels[index] for index in split.val) == 11
        drawn.add(tuple(split.val))
    assert len(drawn) == 5


def test_camelyon16__users_table__is_asked_for_test_slides_only(tmp_path):
    labels = _write(
        tmp_path, "labels.csv", "slide_id,label\nTest_001.tif,1\ntest_002,0\ntumor_001,whatever\n"
    )
    table = camelyon16(_without_files(["test_001", "test_002", "tumor_001", "Normal_001"]), labels)
    assert _label_of(table) == {
        "test_001": "tumor",
        "test_002": "normal",
        "tumor_001": "tumor",
        "Normal_001": "normal",
    }
    assert _part_of(table)["tumor_001"] == _part_of(table)["Normal_001"] == "train"


def test_camelyon16__no_test_slides__need_no_table():
    table = camelyon16(_without_files(["normal_001", "tumor_001"]), None)
    assert (table.labels, table.parts) == ([0, 1], ["train", "train"])
    assert table.cases == table.slide_ids


@pytest.mark.parametrize(
    ("slide_ids", "content", "match"),
    [
        (["normal_001", "mask_1", "tumor_01"], None, r"2 are not: \['mask_1', 'tumor_01'\]"),
        (["test_001"], None, "test slides of CAMELYON16 need a table of labels, but none came"),
        (["test_001", "test_002"], "test_001,Tumor\n", r"lacks 1 slides: \['test_002'\]"),
        (["test_001"], "test_001\ntest_002\n", r"is empty for 1 slides: \['test_001'\]"),
        (["test_001"], "test_001,maybe\n", r"also holds 'maybe' \(slide 'test_001'\)"),
        (["test_001"], "test_001,Tumor\nTest_001,Normal\n", "'test_001' 2 times with label tumor"),
        (["test_001"], "name,label\ntest_001,tumor\n", r"lacks \['slide_id'\]"),
        (["test_001"], "", "needs a header and a row"),
    ],
)
def test_camelyon16__unknown_slide_or_label__is_refused(tmp_path, slide_ids, content, match):
    labels = None if content is None else _write(tmp_path, "reference.csv", content)
    with pytest.raises(ValueError, match=match):
        camelyon16(_without_files(slide_ids), labels)


def _stages(folder):
    stages = ["negative"] * 318 + ["itc"] * 36 + ["micro"] * 59 + ["macro"] * 87
    stage_of = {}
    rows = ["patient,stage"]
    for patient in range(100):
        rows.append(f"patient_{patient:03d}.zip,pN0")
        for node in range(5):
            # 7 has no common factor with 500: the stages are spread over the patients.
            stage = stages[(patient * 5 + node) * 7 % 500]
            stage_of[f"patient_{patient:03d}_node_{node}"] = stage
            rows.append(f"patient_{patient:03d}_node_{node}.tif,{stage}")
    return _write(folder, "stages.csv", "\n".join(rows)), stage_of


def test_camelyon17__all_slides__give_the_published_sizes(tmp_path):
    path, stage_of = _stages(tmp_path)
    table = camelyon17(_without_files(stage_of), path)
    assert _label_of(table) == stage_of
    assert table.classes == ["negative", "itc", "micro", "macro"]
    assert Counter(table.labels) == {0: 318, 1: 36, 2: 59, 3: 87}
    drawn = set()
    for seed in range(5):
        split = split_by_parts(table, val_fraction=0.1, seed=seed)
        assert (len(split.train), len(split.val), len(split.test)) == (270, 30, 200)
        check_split(split, table)
        patients = {int(table.slide_ids[index][8:11]) for index in split.test}
        assert patients == set(range(60, 100))
        drawn.add(tuple(split.val))
    assert len(drawn) == 5


def test_camelyon17__centre__is_the_patient_by_twenty(tmp_path):
    path, _ = _stages(tmp_path)
    ids = [f"patient_{patient:03d}_node_0" for patient in (0, 19, 20, 59, 60, 79, 80, 99)]
    table = camelyon17(_without_files(ids), path)
    assert table.parts == ["train"] * 4 + ["test"] * 4
    assert table.cases[1] == "patient_019"


def test_camelyon17__plain_table__is_read_too(tmp_path):
    labels = _write(
        tmp_path, "labels.csv", "slide_id,label\npatient_060_node_1,itc\npatient_000_node_0,macro\n"
    )
    table = camelyon17(_without_files(["patient_000_node_0", "patient_060_node_1"]), labels)
    assert (table.labels, table.parts) == ([3, 1], ["train", "test"])


@pytest.mark.parametrize(
    ("slide_id", "content", "match"),
    [
        ("patient_100_node_0", "patient,stage\n", r"are not: \['patient_100_node_0'\]"),
        ("patient_000", "patient,stage\n", r"are not: \['patient_000'\]"),
        ("patient_000_node_0", None, "slides of CAMELYON17 need a table of labels"),
        ("patient_000_node_0", "patient,stage\npatient_000.zip,pN0\n", "lacks 1 slides"),
        ("patient_000_node_0", "patient,pn\npatient_000.zip,pN0\n", r"lacks \['stage'\]"),
        (
            "patient_000_node_0",
            "patient,stage\npatient_000_node_0.tif,pN1\n",
            r"one of \['negative', 'itc', 'micro', 'macro'\], .*'pN1'",
        ),
    ],
)
def test_camelyon17__unknown_slide_or_stage__is_refused(tmp_path, slide_id, content, match):
    labels = None if content is None else _write(tmp_path, "stages.csv", content)
    with pytest.raises(ValueError, match=match):
        camelyon17(_without_files([slide_id]), labels)


def _official_folders(root="features"):
    sizes = {"train": 395, "val": 65, "test": 87}
    groups = {"benign": "Group_BT", "atypical": "Group_AT", "malignant": "Group_MT"}
    files, kinds = {}, {}
    for part, size in sizes.items():
        for index in range(size):
            kind = list(SEVEN)[index % 7]
            slide_id = f"BRACS_{len(files)}"
            folder = Path(root, part, groups[SEVEN[kind]], f"Type_{kind}")
            files[slide_id], kinds[slide_id] = folder / f"{slide_id}.h5", kind
    return files, kinds


def test_bracs__official_folders__give_the_published_sizes():
    files, kinds = _official_folders()
    table = bracs(files, None)
    assert table.classes == ["benign", "atypical", "malignant"]
    assert _label_of(table) == {name: SEVEN[kind] for name, kind in kinds.items()}
    split = split_by_parts(table, val_fraction=0.1, seed=0)
    assert (len(split.train), len(split.val), len(split.test)) == (395, 65, 87)
    for part, indices in split.parts.items():
        assert {files[table.slide_ids[index]].parts[1] for index in indices} == {part}


def test_bracs__seven_classes__keep_the_types():
    files, kinds = _official_folders()
    table = bracs(files, None, n_classes=7)
    assert table.classes == list(SEVEN)
    assert _label_of(table) == kinds
    assert COHORTS["bracs7"](files, None) == table
    assert COHORTS["bracs"](files, None) == bracs(files, None)


@pytest.mark.parametrize(
    ("path", "label", "part"),
    [
        ("/data/test/bracs/Train/group_at/TYPE_adh/x.pt", "atypical", "train"),
        ("validation/IC/x.h5", "malignant", "val"),
        ("testing/6_IC/x.h5", "malignant", "test"),
        ("N/val/pb/x.h5", "benign", "val"),
        ("Type-UDH/test/x.h5", "benign", "test"),
    ],
)
def test_bracs__variants_of_folders__count_by_the_nearest(path, label, part):
    table = bracs({"x": Path(path)}, None)
    assert (table.classes[table.labels[0]], table.parts) == (label, [part])


def test_bracs__table__gives_labels_cases_and_parts(tmp_path):
    labels = _write(
        tmp_path,
        "labels.csv",
        "slide_id,label,split,case_id\nBRACS_2.svs,IC,Testing,p1\nBRACS_1.svs,benign,Training,p2\n"
        "BRACS_9,N,Training,p3\n",
    )
    table = bracs(_without_files(["BRACS_1", "BRACS_2"]), labels)
    assert _label_of(table) == {"BRACS_1": "benign", "BRACS_2": "malignant"}
    assert _part_of(table) == {"BRACS_1": "train", "BRACS_2": "test"}
    assert table.cases == ["p2", "p1"]


def test_bracs__table_without_parts__takes_them_from_the_folders(tmp_path):
    labels = _write(tmp_path, "labels.csv", "slide_id,label\na,FEA\nb,DCIS\n")
    table = bracs({"b": Path("val/b.h5"), "a": Path("train/a.h5")}, labels)
    assert _label_of(table) == {"a": "atypical", "b": "malignant"}
    assert _part_of(table) == {"a": "train", "b": "val"}


def test_bracs__no_part_anywhere__leaves_parts_open(tmp_path):
    labels = _write(tmp_path, "labels.csv", "slide_id,label\na,N\n")
    assert bracs({"a": None}, labels).parts == [None]
    assert bracs({"a": Path("Type_N/a.h5")}, None).parts == [None]


@pytest.mark.parametrize(
    ("files", "content", "match"),
    [
        ({"a": None}, None, r"named after a type such as Type_ADH, but 1 do not: \['a'\]"),
        ({"a": Path("train/Group_AT/a.h5")}, None, r"1 do not: \['train/Group_AT/a\.h5'\]"),
        (
            {"a": Path("Type_N/a.h5"), "b": Path("train/Type_N/b.h5")},
            None,
            "named after a part: train, val or test, but 1 do not",
        ),
        ({"a": Path("train/a.h5")}, "slide_id,label\nb,N\n", r"lacks 1 slides: \['a'\]"),
        ({"a": Path("train/a.h5")}, "slide_id,label\na,3\n", "also holds '3'"),
    ],
)
def test_bracs__label_or_part_unknown__is_refused(tmp_path, files, content, match):
    labels = None if content is None else _write(tmp_path, "labels.csv", content)
    with pytest.raises(ValueError, match=match):
        bracs(files, labels)
