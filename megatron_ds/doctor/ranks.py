"""A collective between ranks of this machine, or of a launcher: whether its sum is right, and how fast it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.link_speed import Speed, measure_sum
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from megatron_ds.parallel.rendezvous import meet

SIZES_BYTES = (2**20, 2**26)
TIME_LIMIT_S = 120.0


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
    found = [measure_sum(num_bytes, info.rank, info.world_size, device) for num_bytes in SIZES_BYTES]
    wrong = tuple(speed.num_bytes for speed, is_right in found if not is_right)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = CollectiveResult(dist.get_backend(), name, wrong, tuple(speed for speed, _ in found))
    dist.barrier()
    stop_distributed()
    return result


def describe_speeds(speeds: Sequence[Speed]) -> str:
    """Return the bandwidth at each size, such as `1 MiB in 0.8 ms (1.3 GB/s)`."""
    return ", ".join(
        f"{one.num_bytes / 2**20:g} MiB in {one.seconds * 1e3:.2f} ms ({one.bandwidth / 1e9:.2f} GB/s)"
        for one in speeds
    )
