"""A collective between ranks of this machine, or of a launcher: whether its sum is right, and how fast it is."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from megatron_ds.parallel.rendezvous import meet

SIZES_BYTES = (2**20, 2**26)
REPEATS = 5
TIME_LIMIT_S = 120.0


@dataclass(frozen=True)
class Speed:
    """The speed of an all-reduce in fp32.

    Attributes:
        num_bytes: of the tensor that each rank has.
        seconds: of one all-reduce, the median.
        bandwidth: bytes per second that each rank sends, 2 (n - 1) / n of the tensor in a ring.
    """

    num_bytes: int
    seconds: float
    bandwidth: float


@dataclass(frozen=True)
class CollectiveResult:
    """The result of the collectives on one rank.

    Attributes:
        backend: such as `nccl`.
        device: this rank's, in words.
        wrong: sizes in bytes of tensors whose sum was wrong.
        speeds: of each size.
    """

    backend: str
    device: str
    wrong: tuple[int, ...]
    speeds: tuple[Speed, ...]


def sum_locally(num_ranks: int) -> list[CollectiveResult]:
    """Start ranks on this machine, and return their results in order.

    Raises:
        MegatronDSError: the ranks cannot connect, died, or did not end within `TIME_LIMIT_S`.
    """
    from megatron_ds.engine import preload

    preload()
    return run_local(sum_as_rank, num_ranks, TIME_LIMIT_S)


def sum_as_rank(info: RankInfo, start_timeout_s: float = 60.0) -> CollectiveResult:
    """Join the process group, sum tensors of several sizes over all ranks, and leave. Collective over the world.

    Args:
        info: this rank.
        start_timeout_s: how long ranks of a launcher wait for each other.

    Raises:
        TopologyError: the ranks do not come, or cannot connect.
    """
    from megatron_ds.engine import start_distributed, stop_distributed

    group = None if RENDEZVOUS_FILE in os.environ else meet(info, start_timeout_s)
    device = start_distributed(info, TIME_LIMIT_S, group)
    found = [_sum(num_bytes, info, device) for num_bytes in SIZES_BYTES]
    wrong = tuple(speed.num_bytes for speed, is_right in found if not is_right)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = CollectiveResult(dist.get_backend(), name, wrong, tuple(speed for speed, _ in found))
    dist.barrier()
    stop_distributed()
    return result


def _sum(num_bytes: int, info: RankInfo, device: torch.device) -> tuple[Speed, bool]:
    """Return the speed of an all-reduce, and whether its sum is right. Collective over the world."""
    size = info.world_size
    first = torch.arange(num_bytes // 4, device=device).remainder_(1000).float()
    expected = first * size + size * (size - 1) / 2  # integers below 2^24, exact in fp32
    times_s, is_right = [], True
    for _ in range(REPEATS + 1):
        x = first + info.rank
        dist.barrier()
        _wait(device)
        began_s = time.perf_counter()
        dist.all_reduce(x)
        _wait(device)
        times_s.append(time.perf_counter() - began_s)
        is_right &= bool((x == expected).all())
    seconds = statistics.median(times_s[1:])
    return Speed(num_bytes, seconds, 2 * (size - 1) / size * num_bytes / seconds), is_right


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_speeds(speeds: Sequence[Speed]) -> str:
    """Return the bandwidth at each size, such as `1 MiB in 0.8 ms (1.3 GB/s)`."""
    return ", ".join(
        f"{one.num_bytes / 2**20:g} MiB in {one.seconds * 1e3:.2f} ms ({one.bandwidth / 1e9:.2f} GB/s)"
        for one in speeds
    )
