"""How much memory does training take, over the loaded bag, with the plug-in and without?

Goal 7. Two training steps of each variant in a fresh process: the growth of its resident set at the
peak, with weights, gradients and Adam's state. Run: python -m benchmarks.memory
"""

from rich.table import Table

from benchmarks.models import OURS
from benchmarks.peak import TrainingRun, training_peaks
from benchmarks.record import arguments, show, start, write

N_INSTANCES = 10_000
MODELS = (*OURS, "torchmil ABMIL 1024-512-128", "torchmil TransMIL 1024")
# Ours with the plug-in, relative to a peer that has none.
PAIRS = (
    ("ABMIL 1024-512-128", "torchmil ABMIL 1024-512-128"),
    ("TransMIL 1024", "upstream TransMIL 1024"),
    ("TransMIL 1024", "torchmil TransMIL 1024"),
)


def main() -> None:
    """Measure and print a table."""
    chosen = start(arguments(__doc__, rounds=1))
    names = list(dict.fromkeys([*MODELS, *(peer for _, peer in PAIRS)]))
    bare = {name: TrainingRun(name, N_INSTANCES, has_plugin=False) for name in names}
    plugin = {name: TrainingRun(name, N_INSTANCES, has_plugin=True) for name in MODELS}
    runs = [*bare.values(), *plugin.values()]
    found = [training_peaks([runs[0], *runs], device=chosen.device) for _ in range(chosen.rounds)]
    again, *peaks = (min(of_run) for of_run in zip(*found, strict=True))
    megabytes = dict(zip(runs, peaks, strict=True))
    pairs = {f"{name}, plug-in": (plugin[name], bare[name]) for name in MODELS}
    pairs |= {f"{name} / {peer}": (plugin[name], bare[peer]) for name, peer in PAIRS}
    ratios = {
        key: {
            "ratio": megabytes[run] / megabytes[reference],
            "control": again / megabytes[runs[0]],
            "megabytes": megabytes[run],
            "reference_megabytes": megabytes[reference],
        }
        for key, (run, reference) in pairs.items()
    }
    table = Table("variant / reference", "MB", "reference (MB)", "ratio", "A/A")
    for key, row in ratios.items():
        cells = (f"{row[column]:.1f}" for column in ("megabytes", "reference_megabytes"))
        table.add_row(key, *cells, f"{row['ratio']:.3f}", f"{row['control']:.3f}")
    show(table)
    write("memory", ratios, chosen, instances=N_INSTANCES)


if __name__ == "__main__":
    main()
