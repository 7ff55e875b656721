"""Every command, example, table and quoted error of docs/."""

import ast
import itertools
import re
import shlex

import pytest

from docs.tables import PAGE, page
from mil_anchor.__main__ import main
from mil_anchor.sites import registry
from tests.composing import ROOT

TEXT = PAGE.read_text()


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
    assert TEXT.count("`torchmil.models.") >= 17


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
