"""Command line: python -m mil_anchor {inspect,report,figures} ..."""

import argparse
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from rich.console import Console

from mil_anchor.figures import jsd_figure
from mil_anchor.inspection import inspect_model, load_model
from mil_anchor.results import read_runs, results_markdown, results_tables


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 1 when its input is wrong."""
    chosen = _parser().parse_args(arguments)
    try:
        if chosen.command == "inspect":
            return _inspect(chosen.model, chosen.width, chosen.instances)
        runs = read_runs(chosen.root)
        if chosen.command == "report":
            Console().print(*results_tables(runs))
            (chosen.root / "results.md").write_text(results_markdown(runs))
        else:
            jsd_figure(runs, chosen.root / "jsd.png")
            _say(f"Wrote {chosen.root / 'jsd.png'}")
    except (ValueError, ModuleNotFoundError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mil_anchor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "find and prove the attention of a model, and print the line that names it"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument(
        "model", help="package.module:name of a class, or of a function that makes the model"
    )
    command.add_argument("--width", type=int, default=1024, help="width of the instance features")
    command.add_argument("--instances", type=int, default=100, help="instances of the random bag")
    for name, text in (
        ("report", "print the results of all complete runs below ROOT, and write ROOT/results.md"),
        ("figures", "write ROOT/jsd.png: how much attention moves from epoch to epoch"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("root", type=Path, help="folder with run folders, at any depth")
    return parser


def _inspect(target: str, width: int, n_instances: int) -> int:
    torch.manual_seed(0)
    model = load_model(target, width)
    found = inspect_model(model, width=width, n_instances=n_instances)
    named = list(found.block.named_parameters())
    how = "known by its class" if found.known else "found in what the model ran"
    proof = "the softmax of the scores is one that the model ran"
    if found.difference is not None:
        proof = f"the scores must be what the model's softmax gets, but {found.difference}"
        if not found.provable:
            proof = "not possible: the model runs no softmax over the instances"
    _say(
        f"site        {found.site} ({how})",
        f"block       {found.site.path} ({type(found.block).__name__})",
        f"scores      {found.n_distributions} distribution(s) of {found.n_rows} row(s)",
        f"mirrored    {sum(p.numel() for _, p in named):,} parameters: "
        + ", ".join(name for name, _ in named),
        f"proof       {proof}",
    )
    if found.difference is not None and found.provable:
        return 1
    _say(f"to paste    AnchorCallback({found.site})")
    if not isinstance(model, LightningModule):
        inside = found.site.within("model")
        _say(f"            AnchorCallback({inside})  # as self.model of a LightningModule")
    return 0


def _say(*lines: str) -> None:
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
