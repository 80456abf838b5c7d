"""Process groups that record what a rank would communicate, and move nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from megatron_ds.parallel.grid import Axis
from megatron_ds.planner.operations import Collective, CollectiveKind, Message
from megatron_ds.planner.trace.recorder import Recorder


class _Recorded(dist.Work):
    """Communication that is recorded when it is waited for: hidden if products were computed since it began."""

    def __init__(self, recorder: Recorder, operation: Collective | Message) -> None:
        super().__init__()
        self._settle = recorder.begin(operation)

    def wait(self, *args: Any) -> bool:
        self._settle()
        return True


class _Done(dist.Work):
    def wait(self, *args: Any) -> bool:
        return True


class RecordingGroup(dist.ProcessGroup):
    """The ranks of an axis, which record collectives and messages under its name.

    Args:
        axis: name.
        rank, size: this rank's index along the axis, and the number of ranks.
        recorder: gets the operations.
    """

    def __init__(self, axis: str, rank: int, size: int, recorder: Recorder) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._axis, self._index, self._ranks, self._recorder = axis, rank, size, recorder

    def _begin(self, kind: CollectiveKind, num_bytes: int, uneven_bytes: int | None = None) -> dist.Work:
        operation = Collective(kind, self._axis, num_bytes, self._ranks, uneven_bytes=uneven_bytes)
        return _Recorded(self._recorder, operation)

    def allreduce(self, tensors: Sequence[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        return self._begin("all_reduce", tensors[0].nbytes)

    def all_gather_single(self, output: Tensor, given: Tensor, options: Any = None, *args: Any) -> dist.Work:
        return self._begin("all_gather", output.nbytes)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, options: Any = None, *args: Any) -> dist.Work:
        return self._begin("reduce_scatter", given.nbytes)

    # their names before torch 2.13
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def allgather(  # type: ignore[override]
        self, outputs: Sequence[Sequence[Tensor]], given: Sequence[Tensor], options: Any = None
    ) -> dist.Work:
        return self._begin("all_gather", sum(one.nbytes for one in outputs[0]))

    def all_to_all_single(
        self, output: Tensor, given: Tensor, received: Sequence[int], sent: Sequence[int], options: Any = None
    ) -> dist.Work:
        if not sent or len(set(sent)) == 1:
            return self._begin("all_to_all", given.nbytes)
        to_others = sum(sent) - sent[self._index]
        return self._begin("all_to_all", given.nbytes, uneven_bytes=given.nbytes // max(len(given), 1) * to_others)

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> dist.Work:
        return _Recorded(self._recorder, Message(self._axis, tensors[0].nbytes))

    def recv(self, tensors: Sequence[Tensor], from_: int, tag: int = 0) -> dist.Work:
        return _Done()


class RecordingNeighbours:
    """The ranks of an axis on one machine, as `parallel.neighbours.Neighbours`, under the name "neighbours"."""

    def __init__(self, size: int, recorder: Recorder) -> None:
        self.size, self._recorder = size, recorder

    def gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        self._recorder.record(Collective("all_gather", NEIGHBOURS, out.nbytes, self.size))
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self._recorder.record(Collective("reduce_scatter", NEIGHBOURS, x.nbytes, self.size))
        given = x.contiguous()
        return given.new_empty((x.shape[0] // self.size, *x.shape[1:]))

    def sum_(self, x: Tensor) -> bool:
        if not x.is_contiguous():
            return False
        self._recorder.record(Collective("all_reduce", NEIGHBOURS, x.nbytes, self.size))
        return True


def summing_outside_of_graphs(group: RecordingGroup) -> Callable[[Tensor], bool]:
    """Return an `Axis.sum_here` for compiled blocks, whose graphs end at sums: a recording group cannot be in one."""

    @torch.compiler.disable
    def record(x: Tensor) -> bool:
        group.allreduce([x]).wait()
        return True

    def sum_here(x: Tensor) -> bool:
        return torch.compiler.is_compiling() and record(x)

    return sum_here


NEIGHBOURS = "neighbours"
"""The name of tensor ranks that communicate through the memory of one machine, on CPUs."""


@contextmanager
def known_to_torch(axes: Sequence[Axis]) -> Iterator[None]:
    """Have `torch.distributed` find the ranks of the axes' groups within the block, as messages need it."""
    known = c10d._world.pg_group_ranks
    groups = {axis.group: axis.ranks for axis in axes if axis.group is not None}
    known.update({group: {rank: index for index, rank in enumerate(ranks)} for group, ranks in groups.items()})
    try:
        yield
    finally:
        for group in groups:
            del known[group]
