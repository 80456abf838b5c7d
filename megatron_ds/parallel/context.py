"""Context parallelism of a layer: the ranks that divide each sequence, and the positions of the tokens of each.

Two ways to see the rest of the sequence in attention are combined, c = u * r. In groups of u neighbouring ranks, each
exchanges its part of the sequence for a part of the heads (Ulysses; Jacobs et al. 2023). Over the r groups, keys and
values travel: those that a rank's queries see are fetched at once, or they pass around a ring (Liu et al. 2023).

With causality a query near the end sees more keys than one near the beginning. So r groups divide the sequence into 2r
chunks, and group j holds chunks j and 2r - 1 - j: all have the same work. The u ranks of a group hold consecutive
parts of its positions. Without causality, and with one group, every rank holds consecutive positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ds.parallel.constants import kept
from megatron_ds.parallel.grid import Axis

Runs = tuple[range, ...]
"""Positions, in order, as runs of consecutive ones."""

METHODS = ("gather", "ring")


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that divide each sequence between them. The default is a single process.

    Attributes:
        axis: all of them; a rank's index is its index along `ring` times the size of `ulysses`, plus that along
            `ulysses`.
        ulysses: the ranks that exchange heads.
        ring: the ranks that exchange keys and values.
        method: the way over `ring`: "gather" fetches what the queries see; "ring" passes everything around, where the
            layer allows it.
        zigzag: the positions are divided so that causal attention is even work over `ring`.
    """

    axis: Axis = field(default_factory=Axis)
    ulysses: Axis = field(default_factory=Axis)
    ring: Axis = field(default_factory=Axis)
    method: str = "gather"
    zigzag: bool = False

    def __post_init__(self) -> None:
        assert self.axis.size == self.ulysses.size * self.ring.size, self
        assert self.axis.rank == self.ring.rank * self.ulysses.size + self.ulysses.rank, self
        assert self.method in METHODS, self

    @property
    def multiple_of(self) -> int:
        """Lengths of sequences are multiples of this number."""
        return self.axis.size * (2 if self.zigzag and self.ring.size > 1 else 1)

    def ring_runs(self, length: int, ring_rank: int | None = None) -> Runs:
        """Return the positions of a rank along `ring`: those of its `ulysses` ranks, S/r.

        Args:
            length: S.
            ring_rank: None = this rank's.
        """
        size, rank = self.ring.size, self.ring.rank if ring_rank is None else ring_rank
        if not self.zigzag or size == 1:
            return (_part(range(length), size, rank),)
        first, second = (_part(range(length), 2 * size, chunk) for chunk in (rank, 2 * size - 1 - rank))
        return (range(first.start, second.stop),) if first.stop == second.start else (first, second)

    def runs(self, length: int, rank: int | None = None) -> Runs:
        """Return the positions of the tokens that a context rank holds, S/c.

        Args:
            length: S.
            rank: index along `axis`; None = this rank's.
        """
        ring_rank, part = divmod(self.axis.rank if rank is None else rank, self.ulysses.size)
        return part_of_runs(self.ring_runs(length, ring_rank), self.ulysses.size, part)

    def positions(self, length: int, device: torch.device) -> slice | Tensor:
        """Return the positions of `runs` as an index of a dim of S: a slice if they are one run."""
        return as_index(self.runs(length), device)

    def order(self, length: int, device: torch.device) -> Tensor | None:
        """Return the position of each token in the concatenation of all ranks' parts, (S,); None = 0..S-1."""
        runs = tuple(run for rank in range(self.axis.size) for run in self.runs(length, rank))
        return index_of_runs(runs, device) if self.zigzag and self.ring.size > 1 else None


def _part(positions: range, count: int, index: int) -> range:
    """Return one of `count` consecutive parts of equal length."""
    assert len(positions) % count == 0, (positions, count)
    size = len(positions) // count
    return positions[index * size : (index + 1) * size]


def part_of_runs(runs: Runs, count: int, index: int) -> Runs:
    """Return one of `count` consecutive parts of equal length of the positions in runs."""
    wanted, found, begin = _part(range(sum(map(len, runs))), count, index), [], 0
    for run in runs:
        low, high = max(wanted.start - begin, 0), min(wanted.stop - begin, len(run))
        if low < high:
            found.append(run[low:high])
        begin += len(run)
    return tuple(found)


def as_index(runs: Runs, device: torch.device) -> slice | Tensor:
    """Return positions as an index: a slice if they are one run, else an int64 tensor that is kept on its device."""
    return slice(runs[0].start, runs[0].stop) if len(runs) == 1 else index_of_runs(runs, device)


@kept(maxsize=512)  # of the last lengths, each a few numbers a position
def index_of_runs(runs: Runs, device: torch.device) -> Tensor:
    """Return positions, in order, int64 on a device; made once, because a copy to a GPU makes the host wait."""
    return torch.cat([torch.arange(run.start, run.stop) for run in runs]).to(device)
