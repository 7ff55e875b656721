"""Command line: python -m mil_anchor COMMAND ..."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console, RenderableType
from rich.progress import track

from mil_anchor.data.labels import read_labels
from mil_anchor.data.overview import inspect_data
from mil_anchor.data.repack import repack
from mil_anchor.data.split_files import write_split
from mil_anchor.data.splits import split_by_parts, stratified_fold
from mil_anchor.data.stores import open_store
from mil_anchor.data.synthetic import MPP, PRESETS, SIZES, SyntheticCohort, write_cohort
from mil_anchor.inspection import inspect_model, load_model
from mil_anchor.results import read_runs, read_unfinished
from mil_anchor.tables import as_rich, split_by, write_tables


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 1 when its input is wrong, or when it finds a defect."""
    chosen = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = chosen.run
    try:
        return command(chosen)
    except (ValueError, RuntimeError, ModuleNotFoundError, OSError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. The same command goes on.", style="red")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mil_anchor",
        description="Looks into models and data, prepares data, draws and reports what runs hold.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_inspect,
        _add_inspect_data,
        _add_repack,
        _add_split,
        _add_synthesize,
        _add_heatmap,
        _add_figures,
        _add_report,
    ):
        add(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_inspect(commands: Any) -> None:
    text = "find and prove the attention of a model, and print the line that names it"
    command = _command(commands, "inspect", text, _inspect)
    command.add_argument(
        "model", help="package.module:name of a class, or of a function that makes the model"
    )
    command.add_argument("--width", type=int, default=1024, help="width of the instance features")
    command.add_argument("--instances", type=int, default=100, help="instances of the random bag")


def _inspect(chosen: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model = load_model(chosen.model, chosen.width)
    found = inspect_model(model, width=chosen.width, n_instances=chosen.instances)
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


def _add_inspect_data(commands: Any) -> None:
    text = (
        "read every slide of SRC once and print what is there, what is missing and what is broken"
    )
    command = _command(commands, "inspect-data", text, _inspect_data)
    command.add_argument("source", metavar="SRC", type=Path, help="folder or file of features")
    command.add_argument("labels", type=Path, nargs="?", help="table with slide_id and label")
    command.add_argument("--label", help="column of the labels (default: label)")


def _inspect_data(chosen: argparse.Namespace) -> int:
    table = None if chosen.labels is None else read_labels(chosen.labels, label=chosen.label)
    overview = inspect_data(open_store(chosen.source), table)
    _say(overview)
    return 0 if overview.ok else 1


def _add_repack(commands: Any) -> None:
    text = "write the features of SRC into one contiguous file DST that is fast to read"
    command = _command(commands, "repack", text, _repack)
    command.add_argument("source", metavar="SRC", type=Path, help="folder or file of features")
    command.add_argument("destination", metavar="DST", type=Path, help="the .h5 file to write")
    command.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    command.add_argument(
        "--skip-broken", action="store_true", help="finish without slides that cannot be read"
    )


def _repack(chosen: argparse.Namespace) -> int:
    source = open_store(chosen.source)
    report = repack(source, chosen.destination, dtype=chosen.dtype, skip_broken=chosen.skip_broken)
    _say(str(report))
    return 0


def _add_split(commands: Any) -> None:
    text = "write splits of a table of labels: stratified, and with the slides of a case together"
    command = _command(commands, "split", text, _split)
    command.add_argument("labels", type=Path, help="table with slide_id, label[, split][, case_id]")
    command.add_argument("folder", metavar="DST", type=Path, help="folder for the split files")
    command.add_argument(
        "--folds", type=int, default=5, help="default: 5; a table with a column split has one"
    )
    command.add_argument("--val-fraction", type=float, default=0.1, help="default: 0.1")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument(
        "--layout",
        choices=("plain", "clam"),
        default="plain",
        help="plain (default): fold_<fold>.csv with a column split; clam: splits_<fold>.csv",
    )
    command.add_argument("--label", help="column of the labels (default: label)")


def _split(chosen: argparse.Namespace) -> int:
    table = read_labels(chosen.labels, label=chosen.label)
    drawn = {"val_fraction": chosen.val_fraction, "seed": chosen.seed}
    if any(table.parts):
        splits = [split_by_parts(table, **drawn)]
    else:
        splits = [
            stratified_fold(
                table.labels,
                n_folds=chosen.folds,
                fold=fold,
                cases=table.cases,
                classes=table.classes,
                **drawn,
            )
            for fold in range(chosen.folds)
        ]
    written = set()
    for fold, split in enumerate(splits):
        file = write_split(split, table, folder=chosen.folder, fold=fold, layout=chosen.layout)
        sizes = ", ".join(f"{part} {len(own)}" for part, own in split.parts.items())
        _say(f"Wrote {file}: {sizes}")
        written.add(file)
    others = {*chosen.folder.glob("fold_*.csv"), *chosen.folder.glob("splits_*.csv")} - written
    if others:
        raise ValueError(
            f"{chosen.folder} must hold the folds of one draw, but "
            f"{sorted(file.name for file in others)} are of another. Delete them."
        )
    return 0


def _add_synthesize(commands: Any) -> None:
    text = "write a synthetic cohort of slides: features, labels.csv and a split"
    command = _command(commands, "synthesize", text, _synthesize)
    command.add_argument("folder", metavar="DST", type=Path, help="folder to write")
    command.add_argument("--preset", choices=tuple(PRESETS), default="camelyon_like")
    command.add_argument("--size", choices=tuple(SIZES), default="small")
    command.add_argument("--seed", type=int, default=0, help="seed of the cohort (default: 0)")
    command.add_argument("--layout", choices=("clam", "packed"), default="clam")


def _synthesize(chosen: argparse.Namespace) -> int:
    cohort = SyntheticCohort(chosen.preset, chosen.size, seed=chosen.seed)
    root = write_cohort(cohort, chosen.folder, layout=chosen.layout)
    overrides = [
        "data=folder",
        f"data.root={root}",
        f"data.labels={chosen.folder / 'labels.csv'}",
        f"data.splits={chosen.folder}",
        f"data.mpp={MPP}",
        f"data.classes=[{','.join(cohort.classes)}]",
    ]
    _say(
        f"Wrote {len(cohort)} slides. Train on them:",
        f"python run.py {shlex.join(overrides)}",
    )
    return 0


def _add_heatmap(commands: Any) -> None:
    text = "draw the attention of runs on a slide"
    command = _command(commands, "heatmap", text, _heatmap)
    command.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    command.add_argument("--slide", required=True, metavar="ID", help="name of the slide")
    command.add_argument("--image", type=Path, help="whole-slide image to draw over")
    command.add_argument(
        "--epochs", type=_numbers, help="1,5,10: as in attention.csv, from 0; default: the best"
    )
    command.add_argument(
        "--rows", type=_rows, help="'all', or 0,2: rows (heads, classes); default: their mean"
    )
    command.add_argument(
        "--scale", choices=("percentile", "linear", "log"), default="percentile", help="of colours"
    )
    command.add_argument("--geojson", action="store_true", help="write tiles for QuPath, too")
    command.add_argument(
        "--mpp",
        type=float,
        help="micrometres per level-0 pixel; default: the image's, or data.mpp of the run",
    )
    command.add_argument("--out", type=Path, help="image to write (default: in the run folder)")


def _heatmap(chosen: argparse.Namespace) -> int:
    from mil_anchor.maps.heatmap import heatmap  # needs matplotlib

    files = heatmap(
        chosen.runs,
        chosen.slide,
        epochs=chosen.epochs,
        rows=chosen.rows,
        image=chosen.image,
        scale=chosen.scale,
        geojson=chosen.geojson,
        mpp=chosen.mpp,
        out=chosen.out,
    )
    _say(*(f"Wrote {file}" for file in files))
    return 0


def _add_figures(commands: Any) -> None:
    text = (
        "draw runs as PNG and SVG: how much attention moves by epoch (jsd), how concentrated it is "
        "(concentration), bag features (tsne), histograms of targets (targets)"
    )
    command = _command(commands, "figures", text, _figures)
    command.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="run folder, or folder with run folders at any depth",
    )
    command.add_argument(
        "--out", metavar="DIR", type=Path, help="default: the folder that holds all RUNs"
    )


def _figures(chosen: argparse.Namespace) -> int:
    from mil_anchor.figures import draw_figures  # needs matplotlib

    drawn = draw_figures(read_runs(*chosen.runs), chosen.out or _common(chosen.runs))
    _say(*(f"Wrote {file}" for file in drawn.files))
    _say(*(f"No {name}: {why}" for name, why in drawn.missing.items()))
    return 0


def _add_report(commands: Any) -> None:
    text = (
        "compare all complete runs below ROOT, name those that are missing, and write results.md, "
        "tables/ (CSV and LaTeX) and report.html"
    )
    command = _command(commands, "report", text, _report)
    command.add_argument(
        "roots", metavar="ROOT", type=Path, nargs="+", help="folder with run folders, at any depth"
    )
    command.add_argument(
        "--out", metavar="DIR", type=Path, help="default: the folder that holds all ROOTs"
    )


def _report(chosen: argparse.Namespace) -> int:
    from mil_anchor.result_tables import all_tables  # its scipy.stats is slow to import

    screen = Console(stderr=True)
    shown = partial(track, console=screen, transient=True, disable=not screen.is_terminal)
    runs = read_runs(*chosen.roots, progress=partial(shown, description="reading runs"))
    unfinished = read_unfinished(*chosen.roots)
    tables = all_tables(runs, unfinished, progress=partial(shown, description="comparing"))
    filled = [table for table in tables if table.rows]
    for table in filled:
        if table.name == "reproduction":  # a page of its own
            continue
        Console().print(*map(as_rich, split_by(table, "data")), "")
    out: Path = chosen.out or _common(chosen.roots)
    _say(f"Wrote {write_tables(tables, out)}, and each table into {out / 'tables'}")
    try:
        from mil_anchor.report import write_report  # needs plotly

        write_report(out / "report.html", runs, unfinished=unfinished, tables=filled)
        _say(f"Wrote {out / 'report.html'}")
    except ModuleNotFoundError as error:
        _say(f"No report.html: {error}")
    return 0


def _common(roots: list[Path]) -> Path:
    """The folder that holds all of them; as it is named, if it is one."""
    resolved = {root.resolve() for root in roots}
    return roots[0] if len(resolved) == 1 else Path(os.path.commonpath(resolved))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _rows(text: str) -> list[int] | str:
    return text if text == "all" else _numbers(text)


def _say(*lines: RenderableType) -> None:
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
