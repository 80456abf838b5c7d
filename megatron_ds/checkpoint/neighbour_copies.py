"""Copies of a machine's files of a checkpoint on the disks of the machines after it: `checkpoint.local_copies`.

Machines form a ring in the order of their lowest ranks. A rank sends the files that it has written to one rank of the
next machine, and for further copies to one of the machine after that, in the memory of the hosts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from megatron_ds.checkpoint.files import FileRecord

_CHUNK_BYTES = 2**24

Files = Mapping[str, FileRecord]


def receiver_of(rank: int, distance: int, machines: Sequence[str]) -> int:
    """Return the rank that keeps the files of `rank` on the machine that is `distance` places after its own.

    Args:
        rank: the sender.
        distance: from 1 to the number of machines less 1.
        machines: the machine of each rank.
    """
    ring = list(dict.fromkeys(machines))
    next_machine = ring[(ring.index(machines[rank]) + distance) % len(ring)]
    there = [one for one, machine in enumerate(machines) if machine == next_machine]
    place = [one for one, machine in enumerate(machines) if machine == machines[rank]].index(rank)
    return there[place % len(there)]


def exchange_files(
    directory: Path, files: Sequence[Files], distance: int, machines: Sequence[str], group: dist.ProcessGroup | None
) -> None:
    """Send this rank's files to a later machine, and write those of the ranks that send theirs here.

    Collective over `group`, which has all ranks. A rank that cannot read or write communicates to the end.

    Args:
        directory: where this machine's files are and come.
        files: of each rank, the records of what it has written.
        distance: see `receiver_of`.
        machines: the machine of each rank.
        group: of gloo.

    Raises:
        OSError: a file cannot be read or written, or has not arrived as it was.
    """
    rank = dist.get_rank()
    to = receiver_of(rank, distance, machines)
    senders = [one for one in range(len(machines)) if receiver_of(one, distance, machines) == rank]
    outgoing = _Outgoing(directory, files[rank])
    incoming = {one: _Incoming(directory, files[one]) for one in senders}
    for turn in range(max([outgoing.num_chunks, *(one.num_chunks for one in incoming.values())])):
        chunks = {one: end.next_buffer() for one, end in incoming.items() if turn < end.num_chunks}
        works = [dist.irecv(chunk, one, group) for one, chunk in chunks.items()]
        if turn < outgoing.num_chunks:
            chunk = outgoing.read()  # must live until it is sent
            works.append(dist.isend(chunk, to, group))
        for work in works:
            assert work is not None
            work.wait()
        for one, chunk in chunks.items():
            incoming[one].write(chunk)
    for problem in (outgoing.problem, *(one.problem for one in incoming.values())):
        if problem is not None:
            raise problem


class _Chunk(NamedTuple):
    """A part of a file: `bytes` bytes from `start` on, and what the whole file must be."""

    name: str
    start: int
    bytes: int
    record: FileRecord


def _chunks_of(files: Files) -> list[_Chunk]:
    """Return the parts in which files are sent; an empty file has an empty one."""
    return [
        _Chunk(name, start, min(_CHUNK_BYTES, record.bytes - start), record)
        for name, record in sorted(files.items())
        for start in range(0, max(record.bytes, 1), _CHUNK_BYTES)
    ]


class _Outgoing:
    """The files that a rank sends. After a problem it sends zeros, which their receiver refuses."""

    def __init__(self, directory: Path, files: Files) -> None:
        self._directory, self._chunks = directory, iter(_chunks_of(files))
        self.num_chunks = len(_chunks_of(files))
        self.problem: OSError | None = None

    def read(self) -> Tensor:
        """Return the next chunk: (bytes,) uint8."""
        chunk = next(self._chunks)
        data = bytearray(max(chunk.bytes, 1))
        try:
            with open(self._directory / chunk.name, "rb") as file:
                file.seek(chunk.start)
                file.readinto(data)
        except OSError as problem:
            self.problem = self.problem or problem
        return torch.frombuffer(data, dtype=torch.uint8)


class _Incoming:
    """The files that come from one rank. After a problem the rest is received and not written."""

    def __init__(self, directory: Path, files: Files) -> None:
        self._directory, self._chunks = directory, iter(_chunks_of(files))
        self.num_chunks = len(_chunks_of(files))
        self._chunk: _Chunk | None = None
        self._digest = xxhash.xxh3_128()
        self.problem: OSError | None = None

    def next_buffer(self) -> Tensor:
        """Return a buffer for the next chunk: (bytes,) uint8."""
        self._chunk = next(self._chunks)
        return torch.empty(max(self._chunk.bytes, 1), dtype=torch.uint8)

    def write(self, buffer: Tensor) -> None:
        """Write the chunk that has arrived; the last one of a file is flushed to the disk, and the file compared."""
        chunk = self._chunk
        assert chunk is not None
        if self.problem is None:
            try:
                self._write(chunk, buffer[: chunk.bytes])
            except OSError as problem:
                self.problem = problem

    def _write(self, chunk: _Chunk, data: Tensor) -> None:
        path = self._directory / chunk.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if chunk.start == 0:
            self._digest = xxhash.xxh3_128()
        content = data.numpy().data
        self._digest.update(content)
        with open(path, "ab" if chunk.start else "xb") as file:
            file.write(content)
            if chunk.start + chunk.bytes == chunk.record.bytes:
                file.flush()
                os.fsync(file.fileno())
                if self._digest.hexdigest() != chunk.record.xxh3_128:
                    raise OSError(f"{chunk.name} has not arrived as it was")
