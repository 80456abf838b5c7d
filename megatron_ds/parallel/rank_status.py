"""Statuses of ranks, published in a store that all ranks read: files on one machine, a TCP store under a launcher."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from megatron_ds.atomic import replacing
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE
from megatron_ds.parallel.rendezvous import RankGroup


@dataclass(frozen=True)
class RankStatus:
    """The published status of a rank.

    Attributes:
        number: update number; it grows as long as the rank's process runs.
        heartbeats: number of phases that the rank has entered; equal on ranks that have made the same progress.
        phase: the current phase, such as "step 12: reading data".
        stack: stacks of the rank's threads when it detected a hang; empty before.
    """

    number: int = 0
    heartbeats: int = 0
    phase: str = ""
    stack: str = ""


class RankStatusStore(Protocol):
    """Store in which ranks publish their statuses."""

    def put(self, rank: int, status: RankStatus) -> None:
        """Publish a rank's status; it replaces the previous one."""

    def read(self, rank: int) -> RankStatus:
        """Return the last status of a rank; a default `RankStatus` if it has published none."""

    def claim(self) -> bool:
        """Return True for the first caller: the rank that reports the hang."""


class FileStatusStore:
    """Status store in a directory, for ranks of one machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, rank: int, status: RankStatus) -> None:
        with replacing(self._folder / f"{rank}.note") as temporary:
            temporary.write_text(json.dumps(asdict(status)))

    def read(self, rank: int) -> RankStatus:
        try:
            return RankStatus(**json.loads((self._folder / f"{rank}.note").read_text()))
        except FileNotFoundError:
            return RankStatus()

    def claim(self) -> bool:
        try:
            os.close(os.open(self._folder / "claimed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class TorchStoreStatusStore:
    """Status store in the TCP store of a launcher's rendezvous.

    Args:
        host, port: address of the TCP store.
        group: name of the group of ranks; a launcher that restarts its ranks starts several, one after the other.
    """

    def __init__(self, host: str, port: int, group: str = "0") -> None:
        self._store = dist.PrefixStore(
            f"megatron_ds/{group}", dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=20))
        )

    def put(self, rank: int, status: RankStatus) -> None:
        self._store.set(f"note/{rank}", json.dumps(asdict(status)))

    def read(self, rank: int) -> RankStatus:
        key = f"note/{rank}"
        return RankStatus(**json.loads(self._store.get(key))) if self._store.check([key]) else RankStatus()

    def claim(self) -> bool:
        return self._store.add("claimed", 1) == 1


def rank_status_store(group: RankGroup | None = None) -> RankStatusStore:
    """Return the status store of a launcher's ranks, or with None of those that `run_local` started."""
    if group is None:
        return FileStatusStore(Path(os.environ[RENDEZVOUS_FILE]).parent)
    return TorchStoreStatusStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), group.name)
