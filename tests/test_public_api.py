import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mil_anchor
from tests.composing import ROOT

SOURCE = ROOT / "src" / "mil_anchor"
FLOOR = tuple(
    f"mil_anchor.{name}"
    for name in (
        *("anchor", "attention", "matching", "precision", "ranks", "schedules"),
        *("sites", "targets"),
    )
)
NUMERICS = (
    "attention.py",
    "anchor.py",
    "matching.py",
    "precision.py",
    "ranks.py",
    "schedules.py",
    *(
        f"{room}/{file.name}"
        for room in ("sites", "targets")
        for file in (SOURCE / room).glob("*.py")
    ),
)


def test_public_api__names__are_those_promised():
    promised = {"AnchorCallback", "AttentionMonitor", "AttentionSite"}
    promised |= {"register_site", "find_site", "normalized_sigmoid"}

    assert promised <= set(mil_anchor.__all__)
    assert all(hasattr(mil_anchor, name) for name in mil_anchor.__all__)


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("name", NUMERICS)
def test_floors__numerics__import_neither_lightning_nor_anything_above(name):
    tops = {module.split(".")[0] for module in _imports(SOURCE / name)}

    tops -= set(sys.stdlib_module_names)
    assert tops <= {"torch", "jaxtyping", "einops", "typing_extensions", "mil_anchor"}


@pytest.mark.parametrize("name", NUMERICS)
def test_floors__numerics__do_not_import_the_plugins(name):
    own = {module for module in _imports(SOURCE / name) if module.startswith("mil_anchor")}

    assert all(module.startswith(FLOOR) for module in own)


def test_floors__plugins__do_not_import_the_experiment():
    for file in (SOURCE / "callbacks").glob("*.py"):
        own = {module for module in _imports(file) if module.startswith("mil_anchor")}
        assert all(module.startswith(("mil_anchor.callbacks", *FLOOR)) for module in own), file


def test_floors__baselines__are_plain_torch():
    for file in (ROOT / "baselines").glob("*.py"):
        tops = {module.split(".")[0] for module in _imports(file)}
        assert not tops & {"lightning", "mil_anchor", "torchmetrics"}, file


@pytest.mark.slow
def test_package__imported_alone__does_not_load_hydra_or_scikit_learn():
    code = "import sys, mil_anchor; print({'hydra', 'sklearn'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "set()"
