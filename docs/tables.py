"""Writes the generated parts of the pages: run `python -m docs.tables` from the checkout."""

import inspect
import json
from collections import Counter
from pathlib import Path

import hydra
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.results import speed
from docs.pages import fill
from mil_anchor.composition import plugin_parts
from mil_anchor.sites.known import KNOWN_MODELS
from mil_anchor.targets import as_target
from tests.composing import ROOT, composed
from tests.models.libraries import LIBRARIES
from tests.models.traps import TRAPS

PAGES = [Path(__file__).parent / name for name in ("your-model.md", "your-data.md")]
PAGES.append(ROOT / "README.md")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def share() -> str:
    """How many models of the test matrix discovery finds by itself."""
    cases = [*TRAPS, *LIBRARIES]
    kinds = Counter(case.site.partition("(")[0] for case in cases)
    found = Counter(case.site.partition("(")[0] for case in cases if case.found is not None)
    rows = [f"| `{kind}` | {kinds[kind]} | {found[kind]} |" for kind in sorted(kinds)]
    total = sum(found.values())
    return "\n".join(
        [
            f"Of the {len(cases)} models of the test matrix (torchmil, MONAI, and small copies of "
            f"the structure of other libraries) discovery alone finds {total}, "
            f"{100 * total / len(cases):.0f} %:",
            "",
            "| kind of site | models | found by discovery alone |",
            "|---|---:|---:|",
            *rows,
        ]
    )


def cost() -> str:
    """What search and proof cost, as benchmarks/first_step.py has measured it."""
    measured = json.loads((BENCHMARKS / "first_step.json").read_text())
    rows = [
        f"| {name} | {row['first_milliseconds']:.1f} | {row['milliseconds']:.1f} |"
        for name, row in measured["ratios"].items()
    ]
    return "\n".join(
        [
            f"Milliseconds of one CPU thread per step, ABMIL on {measured['instances']} instances "
            f"of width {measured['width']} (torch {measured['machine']['torch']}, `python -m "
            "benchmarks.first_step`):",
            "",
            "| | first step | later steps |",
            "|---|---:|---:|",
            *rows,
        ]
    )


def supported() -> str:
    """The registry as a table, classes with one site in one row."""
    classes: dict[tuple[str, str, str], list[str]] = {}
    for known in KNOWN_MODELS:
        when = f"Where `{known.when.replace('=', ' = ')}`. " if known.when else ""
        row = (known.source, str(known.site), (when + known.note).strip())
        classes.setdefault(row, []).append(f"`{known.name}`")
    lines = ["| class | from | site | note |", "|---|---|---|---|"]
    for (source, site, note), names in classes.items():
        lines.append(f"| {' '.join(names)} | {source} | `{site}` | {note} |")
    return "\n".join(lines)


def reading() -> str:
    """How fast a bag is read from each layout, as benchmarks/read_bag.py has measured it."""
    measured = json.loads((BENCHMARKS / "read_bag.json").read_text())
    sizes = measured["sizes"]
    rows = [
        f"| {variant} | "
        + " | ".join(f"{of_size[variant]['cpu_ms']:.2f}" for of_size in sizes.values())
        + " |"
        for variant in next(iter(sizes.values()))
        if not variant.endswith("again")
    ]
    return "\n".join(
        [
            "CPU milliseconds of one thread from a warm disk cache to a float32 tensor (torch "
            f"{measured['machine']['torch']}, `python -m benchmarks.read_bag`):",
            "",
            "| | " + " | ".join(f"{size} bag" for size in sizes) + " |",
            "|---|" + "---:|" * len(sizes),
            *rows,
        ]
    )


def memory() -> str:
    """What training takes, as benchmarks/training_memory.py has measured it."""
    measured = json.loads((BENCHMARKS / "training_memory.json").read_text())
    rows = [
        f"| `{keep}` | {row['budget_gb']:g} | {row['peak_gb']:.2f} |"
        for keep, row in measured["keep_in_memory"].items()
    ]
    return "\n".join(
        [
            f"A whole run of ABMIL with the plug-in on {measured['slides']} slides of "
            f"{measured['instances']:,} x {measured['width']}, repacked, two epochs of one thread, "
            "stays under these budgets (`python -m benchmarks.training_memory` takes the largest "
            "resident set of the process, and fails if a budget does not hold):",
            "",
            "| `data.keep_in_memory` | budget, GB | measured, GB |",
            "|---|---:|---:|",
            *rows,
        ]
    )


def plugins() -> str:
    """What each plug-in does, in the words of its file and of its classes' docstrings."""
    rows, said = [], {}
    for file in sorted((ROOT / "conf" / "plugin").glob("*.yaml")):
        config = composed(f"plugin={file.stem}")
        classes = []
        for _, node in plugin_parts(config):
            parts = [hydra.utils.get_object(node["_target_"])]
            if "target" in node:
                target = node["target"]
                built = hydra.utils.instantiate(target) if OmegaConf.is_config(target) else target
                parts.append(type(as_target(built)))
            classes.append(" with ".join(f"`{part.__name__}`" for part in parts))
            said |= {part.__name__: inspect.getdoc(part).splitlines()[0] for part in parts}
        comment = next(line for line in file.read_text().splitlines() if "# " in line)
        rows.append(f"| `{file.stem}` | {comment.partition('# ')[2]} | {' and '.join(classes)} |")
    return "\n".join(
        [
            "| `plugin=` | what it is | made of |",
            "|---|---|---|",
            *rows,
            "",
            *(f"- `{name}`: {text}" for name, text in sorted(said.items())),
        ]
    )


PARTS = {
    "plugins": plugins,
    "share": share,
    "cost": cost,
    "supported": supported,
    "reading": reading,
    "memory": memory,
    "speed": speed,
}


def page(text: str) -> str:
    """A page with its generated parts."""
    return fill(text, PARTS)


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(page(file.read_text()))
    Console().print(share(), markup=False, highlight=False)
