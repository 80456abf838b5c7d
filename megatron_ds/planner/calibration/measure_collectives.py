"""Times of collectives and messages between the ranks of this machine, for profiles.

They are called as training calls them (`parallel.collectives`): on CPUs gathers and scatters are messages, and those of
the tensor axis go through shared memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_ds.parallel.collectives import all_gather_dim0, all_reduce_, reduce_scatter_dim0
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.neighbours import meet_neighbours
from megatron_ds.planner.operations import Collective, Message
from megatron_ds.planner.profiles.link import MeasuredTime

SHORTEST_S = 0.005
ROUNDS = 9
SEGMENT_S, SEGMENTS = 0.02, 20
"""Seconds of computation between two waits, and their number, in a measurement of the ranks' skew."""
NEIGHBOURS = "neighbours"
"""Axis of the tensor ranks of CPUs on one machine, as traces name it."""

Act = Callable[[], object]


def axis_of_all(world: Axis, name: str) -> Axis:
    """Return the axis of all ranks with what an axis of this name communicates by. Collective over the world.

    Args:
        world: all ranks.
        name: "neighbours" for ranks of CPUs that share the memory of one machine; any other name for the rest.
    """
    assert world.group is not None
    if name != NEIGHBOURS or dist.get_backend(world.group) != "gloo":
        return world
    neighbours = meet_neighbours(world.group, world.rank, world.size)
    return replace(world, neighbours=neighbours, sum_here=neighbours.sum_) if neighbours is not None else world


def measure(
    operations: Sequence[Collective | Message], world: Axis, device: torch.device, rounds: int = ROUNDS
) -> list[float]:
    """Return the seconds of each operation on the slowest rank. Collective over the world.

    All of them are measured in each round, so that a disturbance of the machine reaches all alike. Of an operation's
    times the lower quartile counts: whatever else the machine does makes them longer, never shorter.

    Args:
        operations: collectives of all ranks, and messages that each rank sends to the next one. Axis "neighbours"
            stands for itself, any other for all others.
        world: all ranks.
        device: of the tensors.
        rounds: number of times that all are measured.
    """
    axes = {name: axis_of_all(world, name) for name in sorted({one.axis for one in operations})}
    acts = [_prepare(one, axes[one.axis], device) for one in operations]
    calls = [_calls(act, world, device) for act in acts]
    found = torch.empty(rounds, len(acts), dtype=torch.float64)
    for row in found:
        for index, act in enumerate(acts):
            row[index] = _time(act, calls[index], device)
    found = found.to(device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=world.group)
    return [statistics.quantiles(column, n=4)[0] for column in found.T.tolist()]


def measured_times(operations: Sequence[Collective | Message], world: Axis, device: torch.device) -> list[MeasuredTime]:
    """Return the rows of a profile for operations; see `measure`. Collective over the world."""
    times_s = measure(operations, world, device)
    return [
        MeasuredTime(
            kind=one.kind if isinstance(one, Collective) else "message",
            axis=one.axis if one.axis == NEIGHBOURS else None,
            ranks=world.size if isinstance(one, Collective) else 2,
            num_bytes=one.num_bytes,
            us=time_s * 1e6,
        )
        for one, time_s in zip(operations, times_s)
    ]


def measure_skew(world: Axis, device: torch.device, compute: Act, rounds: int = ROUNDS) -> float:
    """Return the share by which computation is longer if every rank waits for the slowest again and again.

    Collective over the world. Ranks compute for about `SEGMENT_S` between two small all-reduces, and as long without
    any; what the all-reduces take by themselves is left out.

    Args:
        world: all ranks.
        device: that computes.
        compute: some computation, the same on all ranks.
        rounds: number of measurements, of which the median counts.
    """
    axis = axis_of_all(world, NEIGHBOURS)
    token = torch.zeros(256, device=device)
    number = _calls(compute, world, device)
    number = max(1, round(number * SEGMENT_S / SHORTEST_S))

    def segment() -> None:
        for _ in range(number):
            compute()

    def segment_and_wait() -> None:
        segment()
        all_reduce_(token, axis)

    sent_s = min(_time(lambda: all_reduce_(token, axis), 100, device) for _ in range(rounds))
    found = []
    for _ in range(rounds):
        times_s = torch.tensor(
            [_time(segment, SEGMENTS, device), _time(segment_and_wait, SEGMENTS, device)], dtype=torch.float64
        ).to(device)
        dist.all_reduce(times_s, group=world.group)
        free_s, waiting_s = (times_s / world.size).tolist()
        found.append((waiting_s - sent_s) / free_s - 1)
    return max(0.0, statistics.median(found))


def _calls(act: Act, world: Axis, device: torch.device) -> int:
    """Return how often an act is repeated in one measurement: as often as the first rank finds right."""
    act()
    number = torch.tensor([SHORTEST_S / max(_time(act, 1, device), 1e-7)], dtype=torch.float64, device=device)
    dist.broadcast(number, src=world.ranks[0], group=world.group)
    return max(1, int(number.item()))


def _time(act: Act, calls: int, device: torch.device) -> float:
    dist.barrier()
    _wait(device)
    began_s = time.perf_counter()
    for _ in range(calls):
        act()
    _wait(device)
    return (time.perf_counter() - began_s) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prepare(operation: Collective | Message, axis: Axis, device: torch.device) -> Act:
    """Return a function that communicates, with its memory allocated; `num_bytes` is rounded to whole rows."""
    rows = max(1, operation.num_bytes // 4 // axis.size) * axis.size
    if isinstance(operation, Message):
        given, received = torch.zeros(rows, device=device), torch.empty(rows, device=device)
        return lambda: _exchange(given, received, axis)
    match operation.kind:
        case "all_reduce":
            x = torch.zeros(rows, device=device)
            return lambda: all_reduce_(x, axis)
        case "all_gather":
            part = torch.zeros(rows // axis.size, device=device)
            return lambda: all_gather_dim0(part, axis)
        case "reduce_scatter":
            x = torch.zeros(rows, device=device)
            return lambda: reduce_scatter_dim0(x, axis)
        case "all_to_all":
            given, received = torch.zeros(rows, device=device), torch.empty(rows, device=device)
            return lambda: dist.all_to_all_single(received, given, group=axis.group)
        case "broadcast":
            x = torch.zeros(rows, device=device)
            return lambda: dist.broadcast(x, src=axis.ranks[0], group=axis.group)


def _exchange(given: torch.Tensor, received: torch.Tensor, axis: Axis) -> None:
    """Send to the next rank and receive from the one before, as the stages of a pipeline do."""
    after, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[(axis.rank - 1) % axis.size]
    operations = [
        dist.P2POp(dist.isend, given, after, axis.group),
        dist.P2POp(dist.irecv, received, before, axis.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
