"""The rank of this process in its job, as torchrun, the `deepspeed` launcher and srun set it in the environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_ds.errors import TopologyError

RENDEZVOUS_FILE = "MEGATRON_DS_RENDEZVOUS"
"""Environment variable of ranks that `run_local` started: the rendezvous file."""

LAUNCHERS = {
    "TORCHELASTIC_RUN_ID": "torchrun",
    "CROSS_RANK": "deepspeed",
    "SLURM_PROCID": "srun",
}
"""Environment variables that a launcher sets for its ranks alone, innermost launcher first."""

LAST_PORT = 65535
MOST_RANKS = 1_000_000  # more than any machine has: a mistake, which would be waited for
_MOST_DIGITS = 19
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM_NAMES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_MASTER_NAMES = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankInfo:
    """The ranks of this process in the job and on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class RankSource:
    """The environment variables that make this process a rank of a job.

    Attributes:
        settings: rank and number of ranks, such as `RANK=0`.
        unset: variables without which it starts alone.
        launcher: the launcher that set them; empty = unknown, such as a shell.
    """

    settings: tuple[str, str]
    unset: tuple[str, ...]
    launcher: str = ""

    def describe(self) -> str:
        """Return the origin of the rank and the way to start alone, as the end of a message."""
        by = f"{self.launcher}: " if self.launcher else ""
        variables = f"{', '.join(self.settings)}, MASTER_ADDR and MASTER_PORT"
        return f"given by {by}{variables} in the environment; {self.start_alone()}"

    def start_alone(self) -> str:
        """Return the command that lets this process start without a launcher."""
        return f"to start alone, unset {' '.join(self.unset)}"


def rank_source(environ: Mapping[str, str] = os.environ) -> RankSource:
    """Return the variables that `rank_from_environment` has read, where it returned a rank."""
    given = tuple(name for name in _NAMES if name in environ)
    rank, world_size, _ = _NAMES if given else _SLURM_NAMES
    settings = (f"{rank}={environ.get(rank)}", f"{world_size}={environ.get(world_size)}")
    known = (LAUNCHERS[name] for name in LAUNCHERS if name in environ and (name == _SLURM_NAMES[0]) != bool(given))
    return RankSource(settings, given or ("SLURM_STEP_ID",), next(known, ""))


def rank_from_environment(environ: MutableMapping[str, str] = os.environ) -> RankInfo | None:
    """Return the rank that a launcher gave this process; None if the process was started without a launcher.

    RANK, WORLD_SIZE and LOCAL_RANK take precedence, so torchrun under srun counts as torchrun. A Slurm step of one
    task, such as an interactive shell, counts as no launcher. srun sets no rendezvous: the first host of the job, and a
    port derived from its id, are written to `environ` if MASTER_ADDR and MASTER_PORT are unset. Use `srun
    --kill-on-bad-exit=1`: srun, not this package, ends the other tasks when one dies.

    Raises:
        TopologyError: some of the variables are missing, or their values are impossible.
    """
    given = [name for name in _NAMES if name in environ]
    if given:
        missing = [name for name in _NAMES if name not in environ]
        if RENDEZVOUS_FILE not in environ:
            missing += [name for name in _MASTER_NAMES if name not in environ]
        if missing:
            raise TopologyError(
                f"the environment sets {', '.join(f'{name}={environ[name]}' for name in given)} but not "
                f"{', '.join(missing)}; start with torchrun, which sets all; {rank_source(environ).start_alone()}"
            )
        place = _place(environ, _NAMES)
        if RENDEZVOUS_FILE not in environ:
            _check_rendezvous(environ)
        return place
    if "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", default="1") > 1:
        place = _place(environ, _SLURM_NAMES)
        _find_slurm_rendezvous(environ)
        _check_rendezvous(environ)
        return place
    return None


def _place(environ: Mapping[str, str], names: tuple[str, str, str]) -> RankInfo:
    rank, world_size, local_rank = (_number(environ, name) for name in names)
    if world_size > MOST_RANKS:
        raise TopologyError(
            f"{names[1]}={world_size} in the environment is more than {MOST_RANKS} ranks; let the launcher set it; "
            f"{rank_source(environ).start_alone()}"
        )
    if world_size < 1:
        raise TopologyError(f"{names[1]}={world_size} in the environment is not at least 1; nearest: 1")
    if not rank < world_size:
        raise TopologyError(
            f"{names[0]}={rank} in the environment is not below {names[1]}={world_size}; nearest: {world_size - 1}"
        )
    return RankInfo(rank, world_size, local_rank)


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise TopologyError(
            f"{name}={text!s:.80} in the environment is not an integer of at least 0; let the launcher set it; "
            f"{rank_source(environ).start_alone()}"
        )
    return int(text)


def _check_rendezvous(environ: Mapping[str, str]) -> None:
    """Check the form of MASTER_ADDR and MASTER_PORT."""
    host, port = (environ[name] for name in _MASTER_NAMES)
    if not host.strip():
        raise TopologyError(f"MASTER_ADDR={host} in the environment is empty; set it to the name of rank 0's machine")
    if not (port.isdecimal() and len(port) <= _MOST_DIGITS and 1 <= int(port) <= LAST_PORT):
        raise TopologyError(
            f"MASTER_PORT={port} in the environment is not a port, an integer from 1 to {LAST_PORT}; try 29500, the "
            "same on every rank"
        )


def _find_slurm_rendezvous(environ: MutableMapping[str, str]) -> None:
    if "MASTER_ADDR" not in environ:
        nodes = environ.get("SLURM_JOB_NODELIST", "")
        try:
            found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            environ["MASTER_ADDR"] = found.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise TopologyError(
                f"MASTER_ADDR is not set, and scontrol does not list the first host of SLURM_JOB_NODELIST={nodes}; "
                f"export MASTER_ADDR=HOST before srun"
            ) from None
    # below the range of Linux's ephemeral ports
    environ.setdefault("MASTER_PORT", str(20000 + _number(environ, "SLURM_JOB_ID", default="0") % 10000))
