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
    runs = [TrainingRun(name, N_INSTANCES, has_plugin=False) for name in names]
    with_plugin = [TrainingRun(name, N_INSTANCES, has_plugin=True) for name in MODELS]
    found = [
        training_peaks([*runs, *runs, *with_plugin], device=chosen.device)
        for _ in range(chosen.rounds)
    ]
    peaks = [min(of_run) for of_run in zip(*found, strict=True)]
    bare = dict(zip(names, peaks, strict=False))
    controls = {
        name: again / bare[name] for name, again in zip(names, peaks[len(names) :], strict=False)
    }
    plugin = dict(zip(MODELS, peaks[2 * len(names) :], strict=True))
    ratios = {
        f"{name}, plug-in": _measured(plugin[name], bare[name], controls[name]) for name in MODELS
    }
    ratios |= {
        f"{name} / {peer}": _measured(plugin[name], bare[peer], controls[peer])
        for name, peer in PAIRS
    }
    table = Table("variant / reference", "MB", "reference (MB)", "ratio", "A/A")
    for key, row in ratios.items():
        megabytes = (f"{row[column]:.1f}" for column in ("megabytes", "reference_megabytes"))
        table.add_row(key, *megabytes, f"{row['ratio']:.3f}", f"{row['control']:.3f}")
    show(table)
    write("memory", ratios, chosen, instances=N_INSTANCES)


def _measured(megabytes: float, reference: float, control: float) -> dict[str, float]:
    return {
        "ratio": megabytes / reference,
        "control": control,
        "megabytes": megabytes,
        "reference_megabytes": reference,
    }


if __name__ == "__main__":
    main()
