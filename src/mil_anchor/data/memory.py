"""How much memory bags may be kept in."""

from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

# Limit, use and the line of memory.stat with what the kernel would drop: versions 2 and 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class MemoryBudget:
    """A number of bytes that the training, validation and test bags of one process share.

    Args:
        keep_in_memory: True for no limit, False for nothing, a number for so many GB (1e9 bytes),
            ``"auto"`` for half of the memory that is available now, divided by the processes.
        n_processes: Training processes on this machine. Used by ``"auto"`` only: a number is meant
            for each process.

    Raises:
        ValueError: If the setting is none of these, or there is no process.

    Example:
        >>> budget = MemoryBudget(keep_in_memory=1.5)
        >>> budget.take(1_000_000_000), budget.take(1_000_000_000), budget.used
        (True, False, 1000000000)
    """

    def __init__(
        self, *, keep_in_memory: bool | float | int | str = "auto", n_processes: int = 1
    ) -> None:
        if n_processes < 1:
            raise ValueError(f"n_processes must be at least 1, but {n_processes} came. Use 1.")
        self.limit = _limit(keep_in_memory=keep_in_memory, n_processes=n_processes)
        self.used = 0

    @property
    def has_room(self) -> bool:
        """Whether anything is left."""
        return self.used < self.limit

    def take(self, n_bytes: int) -> bool:
        """Take bytes out of the budget if they fit, and say whether they did."""
        fits = self.used + n_bytes <= self.limit
        if fits:
            self.used += n_bytes
        return fits

    def __getstate__(self) -> dict[str, float | int]:
        # Kept bags do not travel to another process.
        return {"limit": self.limit, "used": 0}


def available_memory(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Memory that this process may still take.

    A container or a job of a cluster has a limit of its own, a control group, that the machine's
    free memory says nothing about. Cached files count as free, as they do for the machine.

    Args:
        cgroups: Where the control groups are mounted.
        membership: The file that names the groups of this process.

    Returns:
        Bytes: the least of the machine's free memory and the room in each group.
    """
    room = [int(psutil.virtual_memory().available)]
    for folder in _groups(cgroups, membership):
        room.extend(_room(folder))
    return max(0, min(room))


def _limit(*, keep_in_memory: bool | float | int | str, n_processes: int) -> float:
    if keep_in_memory == "auto":
        return available_memory() / 2 / n_processes
    if isinstance(keep_in_memory, bool):
        return float("inf") if keep_in_memory else 0.0
    if isinstance(keep_in_memory, str) or not 0 <= keep_in_memory < float("inf"):
        raise ValueError(
            "keep_in_memory must be true, false, 'auto' or a number of GB from 0, but "
            f"{keep_in_memory!r} came. Use 'auto'."
        )
    return keep_in_memory * 1e9


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process's memory groups, with all groups around them."""
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        root = cgroups / controllers
        folder = root / inside.lstrip("/")
        # In a container the path may be that of the host, of which only the root is visible.
        yield folder
        while folder != root:
            folder = folder.parent
            yield folder


def _room(folder: Path) -> Iterator[int]:
    for limit_name, use_name, cache_name in _CGROUP_FILES:
        limit_file = folder / limit_name
        if not limit_file.is_file():
            continue
        limit = limit_file.read_text().strip()
        if limit == "max":
            continue
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
        use = int((folder / use_name).read_text())
        yield int(limit) - use + int(statistics.get(cache_name, 0))
