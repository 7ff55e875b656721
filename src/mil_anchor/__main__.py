"""Command line: python -m mil_anchor {report,figures} ROOT."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from mil_anchor.figures import jsd_figure
from mil_anchor.results import read_runs, results_markdown, results_tables


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 1 when its input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mil_anchor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("report", "print the results of all complete runs below ROOT, and write ROOT/results.md"),
        ("figures", "write ROOT/jsd.png: how much attention moves from epoch to epoch"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("root", type=Path, help="folder with run folders, at any depth")
    chosen = parser.parse_args(arguments)
    try:
        runs = read_runs(chosen.root)
        if chosen.command == "report":
            Console().print(*results_tables(runs))
            (chosen.root / "results.md").write_text(results_markdown(runs))
        else:
            jsd_figure(runs, chosen.root / "jsd.png")
            Console().print(f"Wrote {chosen.root / 'jsd.png'}", markup=False, soft_wrap=True)
    except (ValueError, ModuleNotFoundError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
