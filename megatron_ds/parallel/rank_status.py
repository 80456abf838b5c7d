"""Statuses of ranks, published in a store that all ranks read: files on one machine, a TCP store under a launcher."""

from __future__ import annotations

import contextlib
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

CONNECT_S = 20.0


@dataclass(frozen=True)
class RankStatus:
    """The published status of a rank.

    Attributes:
        number: update number; it grows as long as the rank's process runs.
        heartbeats: number of phases that the rank has entered; equal on ranks that have made the same progress.
        phase: the current phase, such as "step 12: reading data".
        stack: stacks of the rank's threads when it detected a hang; empty before.
        host: the name of its machine.
        is_waiting: whether it waits for objects of other ranks.
        has_finished: whether it has left regularly, and publishes no more.
    """

    number: int = 0
    heartbeats: int = 0
    phase: str = ""
    stack: str = ""
    host: str = ""
    is_waiting: bool = False
    has_finished: bool = False


class RankStatusStore(Protocol):
    """Store in which ranks publish their statuses.

    Attributes:
        ends_with_rank_0: whether it is out of reach once rank 0 has ended.
    """

    ends_with_rank_0: bool

    def put(self, rank: int, status: RankStatus) -> None:
        """Publish a rank's status; it replaces the previous one."""

    def read(self, rank: int) -> RankStatus:
        """Return the last status of a rank; a default `RankStatus` if it has published none."""

    def sign_of_life(self, rank: int) -> int:
        """Return a number that changes whenever a rank publishes its status; 0 = it has not done so."""

    def add_work(self, amount: int) -> int:
        """Add to the work of all ranks, and return its amount: constant cost at any number of ranks."""

    def claim(self) -> bool:
        """Return True for the first caller: the rank that reports the hang."""


class FileStatusStore:
    """Status store in a directory, for ranks of one machine."""

    ends_with_rank_0 = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, rank: int, status: RankStatus) -> None:
        note, alive = self._folder / f"{rank}.note", self._folder / f"{rank}.alive"
        with contextlib.suppress(OSError), replacing(note) as temporary:  # a full disk
            temporary.write_text(json.dumps(asdict(status)))
        alive.touch()  # needs no space where it exists

    def read(self, rank: int) -> RankStatus:
        try:
            return RankStatus(**json.loads((self._folder / f"{rank}.note").read_text()))
        except FileNotFoundError:
            return RankStatus()

    def sign_of_life(self, rank: int) -> int:
        try:
            return (self._folder / f"{rank}.alive").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def add_work(self, amount: int) -> int:
        file = self._folder / "work"
        if amount:
            file.touch()
        return file.stat().st_mtime_ns if file.exists() else 0

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

    ends_with_rank_0 = True

    def __init__(self, host: str, port: int, group: str = "0") -> None:
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=CONNECT_S))
        store.set_timeout(timedelta(days=1))  # a link may be down for minutes; after a time-out a store is useless
        self._store = dist.PrefixStore(f"megatron_ds/{group}", store)

    def put(self, rank: int, status: RankStatus) -> None:
        self._store.set(f"note/{rank}", json.dumps(asdict(status)))

    def read(self, rank: int) -> RankStatus:
        key = f"note/{rank}"
        return RankStatus(**json.loads(self._store.get(key))) if self._store.check([key]) else RankStatus()

    def sign_of_life(self, rank: int) -> int:
        return self.read(rank).number

    def add_work(self, amount: int) -> int:
        return self._store.add("work", amount)

    def claim(self) -> bool:
        return self._store.add("claimed", 1) == 1


def rank_status_store(group: RankGroup | None = None) -> RankStatusStore:
    """Return the status store of a launcher's ranks, or with None of those that `run_local` started."""
    if group is None:
        return FileStatusStore(Path(os.environ[RENDEZVOUS_FILE]).parent)
    return TorchStoreStatusStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), group.name)
