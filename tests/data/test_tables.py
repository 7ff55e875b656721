import pytest

from mil_anchor.data.tables import check_once, read_cells, read_rows, require_columns


def test_read_rows__byte_order_mark_spaces_and_empty_lines__are_dropped(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes("\ufeffslide_id , label\r\n 001 ,  a b \r\n\r\n , \r\n002,\r\n".encode())
    assert read_rows(path) == [
        {"slide_id": "001", "label": "a b"},
        {"slide_id": "002", "label": ""},
    ]


def test_read_rows__tsv__is_split_at_tabs(tmp_path):
    path = tmp_path / "table.TSV"
    path.write_text('slide_id\tlabel\n"a, b"\tx,y\n')
    assert read_rows(path) == [{"slide_id": "a, b", "label": "x,y"}]


def test_read_rows__short_row__is_filled(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("train,val,test\na,b\n")
    assert read_rows(path) == [{"train": "a", "val": "b", "test": ""}]


def test_read_rows__unnamed_columns__are_allowed(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,,\n1,,\n")
    assert read_rows(path)[0]["a"] == "1"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "header and a row, but .*table.csv has 0 lines"),
        (b"slide_id,label\n ,\n", "header and a row, but .*table.csv has 1 lines"),
        (b"a,a\n1,2\n", r"Every column of .*table.csv must come once, but \['a'\] come twice"),
        (b"a,b\n1,2,3\n", r"not be longer than the header, but .*table.csv has the row \['1',"),
        (b"a,b\n\xff\xfe,2\n", "must be text in UTF-8, but .*table.csv is not"),
    ],
)
def test_read_rows__broken_file__is_refused(tmp_path, content, match):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_rows(path)


def test_read_cells__no_file__is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file, but .*nowhere\.csv is none"):
        read_cells(tmp_path / "nowhere.csv")


def test_require_columns__missing__lists_what_is_there():
    with pytest.raises(ValueError, match=r"t\.csv lacks \['label'\] and has \['id;label'\].*comma"):
        require_columns([{"id;label": "a;b"}], ["label"], source="t.csv")


def test_check_once__twice__is_named():
    check_once(["a", "b"], what="class")
    with pytest.raises(ValueError, match=r"Every class must come once, but \['a'\] come twice"):
        check_once(["a", "b", "a"], what="class")
