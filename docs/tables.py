"""Writes the generated parts of your-model.md: run `python -m docs.tables` from the checkout."""

import json
import re
from collections import Counter
from pathlib import Path

from rich.console import Console

from mil_anchor.sites.known import KNOWN_MODELS
from tests.models.libraries import LIBRARIES
from tests.models.traps import TRAPS

PAGE = Path(__file__).parent / "your-model.md"


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
    measured = json.loads((PAGE.parent.parent / "benchmarks" / "first_step.json").read_text())
    rows = [
        f"| {name} | {row['first_ms']:.1f} | {row['later_ms']:.1f} |"
        for name, row in measured["variants"].items()
    ]
    return "\n".join(
        [
            f"Milliseconds of one CPU thread per step, ABMIL on {measured['instances']} instances "
            f"of width {measured['width']} (torch {measured['torch']}, `python -m "
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


def page(text: str) -> str:
    """The page with its generated parts."""
    for name, part in (("share", share()), ("cost", cost()), ("supported", supported())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, new=part: f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    Console().print(share(), markup=False, highlight=False)
