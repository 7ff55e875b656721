"""On what a run ran: machine, versions, commit."""

import json
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from mil_anchor.run_folder import write_text
from mil_anchor.sweep.slots import usable_cores

ENVIRONMENT_FILE = "environment.json"
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = {
    "torch": "torch",
    "lightning": "lightning",
    "mil_anchor": "mil_anchor",
    "hydra": "hydra-core",
    "numpy": "numpy",
    "torchmetrics": "torchmetrics",
}


def environment() -> dict[str, str | int]:
    """What a result may depend on besides its configuration.

    ``python``, ``platform``, ``processor``, ``n_cores`` (those this process may use),
    ``n_threads`` (torch's), the versions of ``torch``, ``lightning``, ``mil_anchor``, ``hydra``,
    ``numpy`` and ``torchmetrics``; with CUDA ``gpu``, ``n_gpus`` and ``cuda``; in a checkout of
    mil_anchor its ``commit`` and ``changed`` (whether files differ from it); and the ``command``
    line of this process. It says nothing of the user or of environment variables.

    Example:
        >>> sorted(environment())[-4:]
        ['processor', 'python', 'torch', 'torchmetrics']
    """
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "n_cores": usable_cores(),
        "n_threads": torch.get_num_threads(),
        **{name: version(package) for name, package in _PACKAGES.items()},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["n_gpus"] = torch.cuda.device_count()
        found["cuda"] = str(torch.version.cuda)
    commit = _git("rev-parse", "HEAD")
    if commit:
        found["commit"] = commit
        found["changed"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    found["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return found


@rank_zero_only
def write_environment(folder: Path) -> None:
    """Write ``environment.json`` into a run folder: that of the process which runs last in it."""
    write_text(folder / ENVIRONMENT_FILE, json.dumps(environment(), indent=2) + "\n")


def read_environment(folder: Path) -> dict[str, Any]:
    """The run's ``environment.json``; empty if there is none that can be read."""
    try:
        found = json.loads((folder / ENVIRONMENT_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _processor() -> str:
    """The processor's name, which Python leaves empty on Linux."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    """What git says of the checkout that this file lies in; empty if it lies in none."""
    git = shutil.which("git")
    # An installed package may lie in somebody else's checkout, in a .venv say.
    if git is None or not (_ROOT / ".git").exists():
        return ""
    command = [git, "--no-optional-locks", "-C", str(_ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
