import itertools
import re
import shlex
import subprocess
import sys

import pytest

from mil_anchor.__main__ import main
from mil_anchor.composition import check_arguments
from mil_anchor.results import read_runs
from tests.composing import ROOT, composed

README = (ROOT / "README.md").read_text()


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _commands():
    lines = [
        line.split("  #")[0].strip() for block in _blocks("bash") for line in block.splitlines()
    ]
    return [line for line in lines if line]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", _blocks("python"), ids=itertools.count())
def test_readme__python_block__runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mil_anchor.sites.registry._REGISTRY", {})

    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith("python run.py")])
def test_readme__run_command__composes(command):
    overrides = [part for part in shlex.split(command)[2:] if part not in ("-m", "--help")]
    swept = [
        [f"{key}={value}" for value in values.split(",")]
        for key, values in (part.split("=", 1) for part in overrides)
    ]

    # Every choice once; choices do not depend on each other.
    for index in range(max(map(len, swept), default=1)):
        check_arguments(composed(*(values[index % len(values)] for values in swept)))


def test_readme__other_commands__exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    for command in _commands():
        program, *arguments = shlex.split(command)
        if program == "make":
            assert set(arguments) <= targets
        else:
            assert command.startswith(("python run.py", "python -m mil_anchor"))


@pytest.mark.parametrize("page", ["README.md", "docs/your-model.md", "docs/your-data.md"])
def test_pages__commands_of_mil_anchor__are_understood(page, tmp_path, monkeypatch):
    text = (ROOT / page).read_text()
    lines = re.findall(r"^python -m mil_anchor (.*)$", text, flags=re.MULTILINE)
    assert lines
    monkeypatch.chdir(tmp_path)

    for line in lines:
        arguments = shlex.split(line.split("  #")[0])
        # Understood, and then refused for what is not here; else argparse would leave with 2.
        if "torchmil.models" not in line:
            assert main(arguments) == 1


def test_readme__choices__are_those_of_the_configuration():
    for group in ("model", "plugin", "data", "trainer", "logger"):
        row = re.search(rf"^\| `{group}` \|(.*)\|$", README, flags=re.MULTILINE).group(1)
        there = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")} - {"classic"}
        assert set(re.findall(r"`(\w+)`", row)) == there


@pytest.mark.slow
def test_demo__as_the_makefile_runs_it__ends_in_a_table_and_a_figure(tmp_path, capsys):
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    sweep, *others = [line.strip() for line in recipe.group(1).splitlines()]
    assert sweep == "$(BIN)/python run.py -m +experiment=demo"
    assert [line.split(" ", 1)[1] for line in others] == [
        "-m mil_anchor report outputs/demo",
        "-m mil_anchor figures outputs/demo",
    ]
    command = [sys.executable, "run.py", "-m", "+experiment=demo", "trainer.max_epochs=2"]

    subprocess.run([*command, f"out={tmp_path}"], cwd=ROOT, check=True, timeout=500)

    assert len(read_runs(tmp_path)) == 12
    assert main(["report", str(tmp_path)]) == 0
    assert "transmil" in capsys.readouterr().out
    assert main(["figures", str(tmp_path)]) == 0
    assert (tmp_path / "jsd.png").exists()
