import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.labels import PARTS, LabelTable, read_labels
from mil_anchor.data.split_files import read_split, write_split
from mil_anchor.data.splits import Split, check_split

TABLE = LabelTable(
    slide_ids=["s0", "s1", "s2", "s3", "s4", "s5"],
    labels=[0, 1, 0, 1, 0, 1],
    classes=["n", "t"],
    cases=["a", "b", "c", "d", "e", "f"],
    parts=[None] * 6,
)
SPLIT = Split([0, 1], [2, 3], [4, 5])

CLAM = ",train,val,test\n0,s0,s2,s4\n1,s1,s3,s5\n"
PATHO_BENCH = "case_id\tslide_id\tgrade\tfold_0\tfold_1\n" + "".join(
    f"c{i}\ts{i}\t{i % 2}\t{'test' if i > 3 else 'train'}\t{'test' if i < 2 else 'train'}\n"
    for i in range(6)
)
ACMIL = json.dumps(
    {
        "train_names": ["s0.svs", "s1.h5"],
        "val_names": ["s2", "s3"],
        "test_names": ["s4.tif", "s5"],
    }
)
TORCHMIL = "bag_name,split\ns0,train\ns1,train\ns2,val\ns3,val\ns4,test\ns5,test\n"
PLAIN = (
    "slide_id,label,split\ns0.svs,n,Training\ns1,t,train\ns2,n,valid\ns3,t,validation\n"
    "s4,n,testing\ns5,t,test\n"
)


def _write(folder, name, content):
    path = folder / name
    path.write_text(content)
    return path


def _read(path, table=TABLE, *, fold=0, val_fraction=0.5, seed=0):
    return read_split(path, table, fold=fold, val_fraction=val_fraction, seed=seed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("splits_0.csv", CLAM),
        ("split_0.json", ACMIL),
        ("splits.csv", TORCHMIL),
        ("fold_0.csv", PLAIN),
    ],
)
def test_read_split__known_file__is_read_by_itself_and_from_its_folder(tmp_path, name, content):
    path = _write(tmp_path, name, content)
    assert _read(path) == _read(tmp_path) == SPLIT


def test_read_split__clam_columns_of_unequal_length__are_read_to_their_ends(tmp_path):
    content = ",train,val,test\n0,s0,s2,\n1,s1,s3,\n2,s4,,\n3,s5,,\n"
    assert _read(_write(tmp_path, "splits_0.csv", content)) == Split([0, 1, 4, 5], [2, 3], [])


def test_read_split__folder_of_clam__takes_the_fold(tmp_path):
    _write(tmp_path, "splits_0.csv", CLAM)
    _write(tmp_path, "splits_0_bool.csv", ",train,val,test\ns0,True,False,False\n")
    _write(tmp_path, "splits_1.csv", ",train,val,test\n0,s0,s4,s2\n1,s1,s5,s3\n")
    assert _read(tmp_path) == SPLIT
    assert _read(tmp_path, fold=1) == Split([0, 1], [4, 5], [2, 3])
    assert _read(tmp_path / "splits_1.csv", fold=1) == _read(tmp_path / "splits_1.csv")
    with pytest.raises(ValueError, match=r"one of \['splits_7\.csv', .*holds \['splits_0\.csv'"):
        _read(tmp_path, fold=7)


def test_read_split__patho_bench__draws_validation_from_training(tmp_path):
    path = _write(tmp_path, "k=all.tsv", PATHO_BENCH)
    _write(tmp_path, "config.yaml", "task_col: grade\n")
    table = read_labels(path)
    first, second = _read(path, table), _read(tmp_path, table, fold=1)
    assert first.test == [4, 5]
    assert second.test == [0, 1]
    assert sorted(first.train + first.val) == [0, 1, 2, 3]
    assert len(first.val) == 2
    assert first == _read(path, table)
    assert len({tuple(_read(path, table, seed=seed).val) for seed in range(8)}) > 1
    with pytest.raises(ValueError, match=r"has \['fold_0', 'fold_1'\] and fold 2 came"):
        _read(path, table, fold=2)


def test_read_split__patho_bench__keeps_cases_together(tmp_path):
    rows = "".join(
        f"c{i // 2}\ts{i}\t{i // 2 % 2}\t{'test' if i >= 16 else 'train'}\n" for i in range(20)
    )
    path = _write(tmp_path, "k=all.tsv", f"case_id\tslide_id\tlabel\tfold_0\n{rows}")
    table = read_labels(path)
    for seed in range(5):
        split = _read(path, table, val_fraction=0.3, seed=seed)
        assert len(split.val) in (4, 6)
        check_split(split, table)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("splits_0.csv", CLAM),
        ("split_0.json", ACMIL),
        ("splits.csv", TORCHMIL),
        ("plain.tsv", PLAIN.replace(",", "\t")),
    ],
)
def test_read_split__file_of_one_split__does_not_serve_another_fold(tmp_path, name, content):
    path = _write(tmp_path, name, content)
    with pytest.raises(ValueError, match="holds one split and fold 2 came"):
        _read(path, fold=2)


def test_read_split__slides_in_no_part__are_left_out_with_one_warning(tmp_path):
    path = _write(tmp_path, "splits_0.csv", ",train,val,test\n0,s0,s2,\n1,s1,s3,\n")
    with pytest.warns(UserWarning, match=r"leaves out 2 of 6 slides .*\['s4', 's5'\]") as caught:
        assert _read(path) == Split([0, 1], [2, 3], [])
    assert len(caught) == 1


def test_read_split__id_that_ends_like_a_file__is_found_as_it_is(tmp_path):
    table = replace(TABLE, slide_ids=["s0.svs", "s1", "s2", "s3", "s4", "s5"])
    path = _write(tmp_path, "splits.csv", TORCHMIL.replace("s0", "s0.svs"))
    assert _read(path, table) == SPLIT


def test_read_split__case_in_two_parts__is_refused_by_name(tmp_path):
    path = _write(tmp_path, "splits_0.csv", CLAM)
    with pytest.raises(ValueError, match="'b' in train and test"):
        _read(path, replace(TABLE, cases=["a", "b", "c", "d", "e", "b"]))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "splits_0.csv",
            CLAM.replace("s5", "x5").replace("s4", "x4"),
            r"splits_0\.csv names 2 others: \['x4', 'x5'\].*table has \['s0'",
        ),
        ("splits_0.csv", CLAM.replace("s5", "s1"), "'s1' in train and test"),
        ("splits_0.csv", CLAM.replace("s1", "s0"), "'s0' in train and train"),
        ("split_0.json", ACMIL.replace("s1", "s0"), "'s0' in train and train"),
        ("splits_0.csv", ",train,val,test\ns0,True,False,False\n", "without _bool in its name"),
        ("splits_0.csv", ",train,val\n0,s0,s1\n", r"must have the columns train, val and test; "),
        (
            "splits.csv",
            TORCHMIL.replace("val", "dev"),
            r"but 'dev' came for slide '\w+' in .*splits",
        ),
        ("splits_0.csv", ",train,val,test\n0,,s0,s1\n", "needs slides for training"),
        ("splits_0.csv", ",train,val,test\n0,s0,s2,s4\n1,s1,,s5\n", "'val' has none of class t"),
        ("split_0.json", "{", "must be JSON in UTF-8, but .*split_0.json is not"),
        ("split_0.json", "[1]", r"have the lists \['train_names'.*begins with '\[1\]'"),
        ("split_0.json", '{"train_names": "s0"}', "must have the lists"),
        ("split_0.json", "{}", "must have the lists"),
    ],
)
@pytest.mark.filterwarnings("ignore:The split leaves out")
def test_read_split__broken_file__is_refused(tmp_path, name, content, match):
    with pytest.raises(ValueError, match=match):
        _read(_write(tmp_path, name, content))


def test_read_split__folder_without_or_with_two_splits__lists_them(tmp_path):
    _write(tmp_path, "other.txt", "")
    with pytest.raises(ValueError, match=r"holds \['other\.txt'\]"):
        _read(tmp_path)
    _write(tmp_path, "splits_0.csv", CLAM)
    _write(tmp_path, "splits.csv", TORCHMIL)
    with pytest.raises(ValueError, match=r"holds \['splits_0\.csv', 'splits\.csv'\]\. Give the"):
        _read(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "splits_0.csv", "split_0.json"])
def test_read_split__nothing_there__is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"must lie in a file or folder, but .*{name} is none"):
        _read(tmp_path / name)


_NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6
).filter(lambda name: name.lower() not in ("true", "false"))


@st.composite
def _splits(draw):
    """Odd names, cases and parts; a case is one slide or several of one part."""
    n_slides = draw(st.integers(4, 14))
    names = draw(st.lists(_NAMES, min_size=n_slides, max_size=n_slides, unique=True))
    parts = [
        "train",
        "train",
        "val",
        "val",
        *draw(
            st.lists(
                st.sampled_from(PARTS),
                min_size=n_slides - 4,
                max_size=n_slides - 4,
            )
        ),
    ]
    case_of = {part: f"shared, {part}" for part in PARTS}
    shared = draw(st.lists(st.booleans(), min_size=n_slides, max_size=n_slides))
    cases = [
        case_of[part] if joined else f"case {index}"
        for index, (part, joined) in enumerate(zip(parts, shared, strict=True))
    ]
    return names, cases, parts


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_splits(), st.sampled_from(["plain", "clam"]), st.integers(0, 12))
def test_write_split__any_split__can_be_read_again(tmp_path_factory, case, layout, fold):
    names, cases, parts = case
    labels = [index % 2 for index in range(len(names))]
    table = LabelTable(names, labels, ['"n"', "t, u"], cases, [None] * len(names))
    split = Split(*([i for i, own in enumerate(parts) if own == part] for part in PARTS))
    folder = tmp_path_factory.mktemp("splits") / "new"
    path = write_split(split, table, folder=folder, fold=fold, layout=layout)
    assert path.name == {"plain": f"fold_{fold}.csv", "clam": f"splits_{fold}.csv"}[layout]
    assert _read(folder, table, fold=fold) == _read(path, table, fold=fold) == split


def test_write_split__plain__is_a_label_table_too(tmp_path):
    path = write_split(SPLIT, TABLE, folder=tmp_path)
    parts = ["train", "train", "val", "val", "test", "test"]
    assert read_labels(path) == replace(TABLE, parts=parts)


def test_write_split__clam__has_its_form(tmp_path):
    path = write_split(Split([0, 1], [2, 3], [4]), TABLE, folder=tmp_path, fold=3, layout="clam")
    assert path.read_text() == ",train,val,test\n0,s0,s2,s4\n1,s1,s3,\n"


def test_write_split__slide_in_no_part__has_an_empty_cell(tmp_path):
    write_split(Split([0, 1], [2, 3], [4]), TABLE, folder=tmp_path)
    with pytest.warns(UserWarning, match=r"leaves out 1 of 6 slides"):
        assert _read(tmp_path) == Split([0, 1], [2, 3], [4])


def test_write_split__leaking_split__is_not_written(tmp_path):
    with pytest.raises(ValueError, match="'a' in train and val"):
        write_split(SPLIT, replace(TABLE, cases=list("abadef")), folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()
