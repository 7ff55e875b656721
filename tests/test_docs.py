"""Every command, example, table and quoted error of docs/."""

import ast
import itertools
import re
import shlex

import pytest

from docs.tables import PAGES, page
from mil_anchor.__main__ import main
from mil_anchor.composition import check_arguments
from mil_anchor.data.cohorts import COHORTS
from mil_anchor.sites import registry
from tests.composing import ROOT, composed
from tests.data.stores.layouts import write_trident

PAGE, DATA_PAGE, README = PAGES
TEXT, DATA_TEXT = PAGE.read_text(), DATA_PAGE.read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL), ids=itertools.count()
)
def test_your_model__python_block__runs(block, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    known = {name: list(sites) for name, sites in registry._REGISTRY.items()}
    monkeypatch.setattr(registry, "_REGISTRY", known)

    with caplog.at_level("INFO"):
        exec(compile(block, PAGE.name, "exec"), {"__name__": "docs"})

    # What a block says about the log is what stands there.
    for comment in re.findall(r"^# (AnchorCallback\(.*\))$", block, flags=re.MULTILINE):
        assert f"To name it: {comment}." in caplog.text


def test_your_model__inspect_commands__work(monkeypatch, capsys):
    lines = re.findall(r"^python -m mil_anchor (inspect .*)$", TEXT, flags=re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        own = line.replace("my_package.models:make_model", "tests.third_party:MeanModel")
        arguments = shlex.split(own)
        assert main(arguments) == 0
        assert "to paste    AnchorCallback(" in capsys.readouterr().out


def test_your_model__generated_parts__are_up_to_date():
    assert page(TEXT) == TEXT, "run: python -m docs.tables"
    assert page(DATA_TEXT) == DATA_TEXT, "run: python -m docs.tables"
    assert page(README.read_text()) == README.read_text(), "run: python -m docs.tables"
    assert TEXT.count("`torchmil.models.") >= 17


def test_page__empty_parts__are_filled_and_leave_what_is_between():
    text = "<!-- memory -->\n<!-- end -->\nbetween\n<!-- reading -->\n<!-- end -->\nafter\n"
    filled = page(text)
    assert filled.count("<!-- end -->\nbetween\n<!-- reading -->\nCPU milliseconds") == 1
    assert filled.endswith("|\n<!-- end -->\nafter\n")
    assert page(filled) == filled


def test_your_model__quoted_errors__stand_in_the_source():
    strings = []
    for file in (ROOT / "src" / "mil_anchor").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                strings.append("".join(parts))
    section = TEXT.split("## What the errors mean")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]*)` \|", section, flags=re.MULTILINE)
    assert len(quoted) >= 12
    for message in quoted:
        # Two strings may meet in a message.
        halves = message.split(", but ") if ", but " in message else [message]
        assert all(any(half in string for string in strings) for half in halves), message


def test_your_data__python_blocks__run_and_print(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", DATA_TEXT, flags=re.DOTALL)
    write_trident(tmp_path, "slide_1").parent.rename(tmp_path / "features")
    monkeypatch.chdir(tmp_path)

    for block, printed in zip(blocks, ("FROC 1.000 (by hand;", "PixelCoords 512"), strict=True):
        exec(compile(block, DATA_PAGE.name, "exec"), {"__name__": "docs"})
        assert printed in capsys.readouterr().out


def test_your_data__run_commands__compose():
    lines = re.findall(r"^python run.py (.*)$", DATA_TEXT, flags=re.MULTILINE)
    assert lines
    for line in lines:
        check_arguments(composed(*shlex.split(line)))


def test_your_data__number_of_maps__is_the_default():
    assert f"on `maps` ({composed().maps}) validation slides" in DATA_TEXT


def test_your_data__split_files_and_cohorts__are_those_that_exist():
    cohorts = DATA_TEXT.split("## Public cohorts")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", cohorts, flags=re.MULTILINE))
    assert named | {"bracs7"} == set(COHORTS)
