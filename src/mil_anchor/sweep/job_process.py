"""A job of a sweep as a single run in a process of its own."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mil_anchor.failure import ERROR_FILE, last_exception, read_error

OUTPUT_FILE = "output.log"
_CONFIG_OPTIONS = (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir"))
# What a process of a distributed run, or a task of SLURM, is told: the job is a run by itself.
_RANK_VARIABLES = re.compile(
    r"((LOCAL|NODE|GROUP|ROLE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*|PL_GLOBAL_SEED|PL_SEED_WORKERS|SLURM_(NTASKS|PROCID|LOCALID)"
)
# Waits for the end of its input, which comes when the sweep's process ends, however it does; then
# it ends the whole process group of the job.
_GUARD = 'read _; kill -s KILL -- "-$0"'


class JobProcess:
    """Starts ``python run.py OVERRIDES`` and follows it; what it prints goes to ``output.log``.

    The process leads a group of its own, with those that it starts itself (the ranks of DDP). The
    whole group ends with its leader, and with the process that made this object, even when that is
    killed.

    Args:
        overrides: Hydra's, besides that of the run's folder.
        folder: Of the run.
        threads: That torch starts each process with.
    """

    def __init__(self, overrides: Sequence[str], *, folder: Path, threads: int) -> None:
        self._folder = folder
        self._began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR_FILE).unlink(missing_ok=True)  # of an earlier attempt
        command = [
            *_own_command(),
            *overrides,
            "hydra.mode=RUN",
            f"hydra.run.dir={_quoted(folder)}",
        ]
        with (folder / OUTPUT_FILE).open("ab") as output:
            self._start_of_output = output.tell()
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(threads),
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def has_ended(self) -> bool:
        """Whether the run is over; nothing of its group is left then."""
        if self._process.poll() is None:
            return False
        self._signal(signal.SIGKILL)
        self._guard.kill()
        self._guard.communicate()
        return True

    def interrupt(self) -> None:
        """Ask the run to stop, as Ctrl-C does."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self.has_ended()

    def error(self) -> str | None:
        """Why the ended run failed, in one line; None if it did not."""
        code = self._process.returncode
        if code == 0:
            return None
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"killed by signal {-code} ({names.get(-code, 'unnamed')})"
        said = read_error(self._folder)
        if said is not None:
            return said
        with (self._folder / OUTPUT_FILE).open("rb") as stream:
            stream.seek(self._start_of_output)
            return f"exit code {code}: {last_exception(stream.read().decode(errors='replace'))}"

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # all of the group have ended
            os.killpg(self._process.pid, number)


def _own_command() -> list[str]:
    """This program, with where it was told to find its configuration."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in _CONFIG_OPTIONS:
        parser.add_argument(*names)
    given, _ = parser.parse_known_args(sys.argv[1:])
    told = [f"--{key.replace('_', '-')}={value}" for key, value in vars(given).items() if value]
    return [sys.executable, str(Path(sys.argv[0]).absolute()), *told]


def _quoted(folder: Path) -> str:
    """A path as a quoted string of Hydra's grammar, where a backslash counts before quotes only."""
    return '"' + re.sub(r'(\\*)("|$)', _escaped, str(folder)) + '"'


def _escaped(match: re.Match[str]) -> str:
    return match[1] * 2 + match[2].replace('"', '\\"')


def _environment(threads: int) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not _RANK_VARIABLES.fullmatch(key)}
    # DDP's processes would otherwise each take as many threads as if the job had all cores.
    # Hydra's short form of an error does not say where it was raised.
    return own | {"OMP_NUM_THREADS": str(threads), "HYDRA_FULL_ERROR": "1"}
