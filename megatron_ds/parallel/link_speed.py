"""Collectives and messages with known results, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

REPEATS = 5
LARGEST = 100  # of the numbers that are sent; the sums of 2^17 ranks are exact in fp32
STEPS = 8  # numbers of neighbouring ranks differ by one; these repeat after so many


@dataclass(frozen=True)
class Speed:
    """The speed of a collective or a message in fp32.

    Attributes:
        num_bytes: of the tensor that each rank has.
        seconds: of one, the median.
        bandwidth: bytes per second that each rank sends: 2 (n - 1) / n of the tensor for an all-reduce in a ring.
    """

    num_bytes: int
    seconds: float
    bandwidth: float


def measure_sum(num_bytes: int, rank: int, size: int, device: torch.device) -> tuple[Speed, bool]:
    """Return the speed of an all-reduce, and whether its sum is right. Collective over the world.

    Args:
        num_bytes: of the tensor.
        rank, size: this rank, and the number of ranks.
        device: of the tensor.
    """
    first = _numbers(num_bytes, device)
    expected = expected_sum(first, size)

    def add() -> bool:
        x = first + rank % STEPS
        return _timed(lambda: dist.all_reduce(x), times_s, device) and bool((x == expected).all())

    times_s: list[float] = []
    found = [add() for _ in range(REPEATS + 1)]  # all of them, even after a wrong one: the others do so
    seconds = statistics.median(times_s[1:])
    return Speed(num_bytes, seconds, 2 * (size - 1) / size * num_bytes / seconds), all(found)


def expected_sum(first: Tensor, size: int) -> Tensor:
    """Return the sum of `first + rank % STEPS` over the ranks: integers below 2^24."""
    return first * size + sum(rank % STEPS for rank in range(size))


def measure_link(num_bytes: int, rank: int, size: int, device: torch.device) -> tuple[Speed, bool]:
    """Return the speed of messages from the rank before this one, and whether they arrive right.

    All ranks send to the next one at the same time, the last one to the first, as in a ring. Collective over the world.

    Args:
        num_bytes: of a message.
        rank, size: this rank, and the number of ranks.
        device: of the tensors.
    """
    first = _numbers(num_bytes, device)
    before, after = (rank - 1) % size, (rank + 1) % size
    given, received = first + rank % STEPS, torch.empty_like(first)

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, given, after), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def is_right() -> bool:
        received.zero_()
        return _timed(exchange, times_s, device) and bool((received == first + before % STEPS).all())

    times_s: list[float] = []
    found = [is_right() for _ in range(REPEATS + 1)]
    seconds = statistics.median(times_s[1:])
    return Speed(num_bytes, seconds, num_bytes / seconds), all(found)


def _numbers(num_bytes: int, device: torch.device) -> Tensor:
    return torch.arange(num_bytes // 4, device=device).remainder_(LARGEST).float()


def _timed(act: Callable[[], object], times_s: list[float], device: torch.device) -> bool:
    """Add the time of an action, which all ranks begin at the same time. Return True."""
    dist.barrier()
    _wait(device)
    began_s = time.perf_counter()
    act()
    _wait(device)
    times_s.append(time.perf_counter() - began_s)
    return True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
