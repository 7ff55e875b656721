"""How much memory does training take, over the loaded bag, with the plug-in and without?

Goal 7. Two training steps of each variant in a fresh process: the growth of its resident set at the
peak, with weights, gradients and Adam's state. Run: python -m benchmarks.memory
"""

from rich.table import Table

from benchmarks.models import OURS
from benchmarks.peak import training_peak
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
    bare: dict[str, float] = {}
    controls: dict[str, float] = {}
    plugin: dict[str, float] = {}
    for name in dict.fromkeys([*MODELS, *(peer for _, peer in PAIRS)]):
        bare[name] = _peak(name, chosen.rounds, has_plugin=False, device=chosen.device)
        again = _peak(name, chosen.rounds, has_plugin=False, device=chosen.device)
        controls[name] = again / bare[name]
        if name in MODELS:
            plugin[name] = _peak(name, chosen.rounds, has_plugin=True, device=chosen.device)
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


def _peak(name: str, rounds: int, *, has_plugin: bool, device: str) -> float:
    peaks = [
        training_peak(name, N_INSTANCES, has_plugin=has_plugin, device=device)
        for _ in range(rounds)
    ]
    return min(peaks)


def _measured(megabytes: float, reference: float, control: float) -> dict[str, float]:
    return {
        "ratio": megabytes / reference,
        "control": control,
        "megabytes": megabytes,
        "reference_megabytes": reference,
    }


if __name__ == "__main__":
    main()
