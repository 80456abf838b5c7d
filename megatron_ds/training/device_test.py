"""The test of devices, memory and links before the first step (`train.device_test`), about a second long.

Every result is known beforehand and exact, so that one wrong bit is a fault: products of small integers, whatever the
order in which they are added; patterns that are written to memory and read back; numbers that ranks send and add up.
Links are measured between each rank and the next.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.errors import HardwareError
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks
from megatron_ds.parallel.link_speed import measure_link, measure_sum
from megatron_ds.parallel.rank_info import RankInfo

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = 8  # in each dtype
PRODUCT_SIZE = {"cuda": 4096, "cpu": 256}
MEMORY_BYTES = 2**27  # on a CPU; of a GPU most of what is free
MEMORY_SHARE = 0.8
PATTERNS = (0, -1, 0x5555555555555555, -0x5555555555555556)
MESSAGE_BYTES = {"cuda": 2**26, "cpu": 2**22}
SLOW_LINK = 0.5  # of the median bandwidth


@dataclass(frozen=True)
class DeviceResult:
    """The result of one rank.

    Attributes:
        host: its machine.
        faults: what is wrong, in words; empty = nothing.
        memory_bytes: number of bytes that were tested.
        link: bytes per second from the rank before; 0 with one rank.
    """

    host: str
    faults: tuple[str, ...]
    memory_bytes: int
    link: float


def run_device_test(info: RankInfo, device: torch.device) -> list[str]:
    """Test all ranks' devices and links, and return lines about them. Collective over the world.

    Raises:
        HardwareError: on rank 0, results are wrong; the message names the ranks and their machines.
    """
    everyone = gather_objects(_test(info, device))
    faults = [f"rank {rank} (host {one.host}): {fault}" for rank, one in enumerate(everyone) for fault in one.faults]

    def raise_error() -> None:
        if faults:
            raise HardwareError(
                f"train.device_test: {'; '.join(faults[:8])}{f'; and {len(faults) - 8} more' if faults[8:] else ''}; "
                "try other machines; train.device_test=false would train on these"
            )

    run_on_all_ranks(raise_error)
    return describe_results(everyone)


def describe_results(everyone: Sequence[DeviceResult]) -> list[str]:
    """Return lines about what was tested without a fault, and about links that are slow.

    Links between machines and those within one are held against the median of their kind.
    """
    tested = sum(one.memory_bytes for one in everyone)
    links = {rank: one.link for rank, one in enumerate(everyone) if one.link > 0}
    lines = [f"device test of {len(everyone)} ranks: products and {tested / 1e9:,.2f} GB of memory are right"]
    if not links:
        return lines
    lines[0] += f", and links; the slowest of them has {min(links.values()) / 1e9:.2f} GB/s"
    kinds = {rank: everyone[rank].host == everyone[rank - 1].host for rank in links}
    for is_within in (True, False):
        same = {rank: links[rank] for rank in links if kinds[rank] == is_within}
        median = statistics.median(same.values()) if same else 0.0
        lines += [
            f"the link from rank {(rank - 1) % len(everyone)} (host {everyone[rank - 1].host}) to rank {rank} (host "
            f"{everyone[rank].host}) is slow: {own / 1e9:.2f} GB/s, the median of such links is {median / 1e9:.2f} GB/s"
            for rank, own in same.items()
            if own < SLOW_LINK * median
        ]
    return lines


def _test(info: RankInfo, device: torch.device) -> DeviceResult:
    faults = [fault for dtype in DTYPES if (fault := wrong_products(dtype, device))]
    memory_bytes, num_wrong = _test_memory(device)
    if num_wrong:
        faults.append(f"{num_wrong:,} of {memory_bytes // 8:,} words of memory read back differently")
    if info.world_size == 1:
        return DeviceResult(socket.gethostname(), tuple(faults), memory_bytes, 0.0)
    size = MESSAGE_BYTES[device.type]
    speed, arrives = measure_link(size, info.rank, info.world_size, device)
    _, is_sum_right = measure_sum(size, info.rank, info.world_size, device)
    if not arrives:
        faults.append(f"messages from rank {(info.rank - 1) % info.world_size} arrive wrong")
    if not is_sum_right:
        faults.append("a sum over all ranks is wrong")
    return DeviceResult(socket.gethostname(), tuple(faults), memory_bytes, speed.bandwidth)


def wrong_products(dtype: torch.dtype, device: torch.device) -> str:
    """Multiply matrices whose product is known; return what is wrong, or an empty text.

    The left matrix is a_i u_k, the right one u_k b_j v_k, with signs u and v, so that the product is a_i b_j times the
    sum of v. As v alternates, each sum of neighbouring products is a small integer: exact in 16 bits too, in whatever
    parts and order they are added.
    """
    size = PRODUCT_SIZE[device.type]
    index = torch.arange(size, device=device)
    a, b = index % 4 + 1, index % 3 - 1
    u = 1 - 2 * (index * 7919 % 13 % 2)
    v = 1 - 2 * (index % 2)
    v[-4:] = 1  # the sum is 4 - 0: pairs before cancel
    left = (a[:, None] * u[None, :]).to(dtype)
    right = ((u * v)[:, None] * b[None, :]).to(dtype)
    expected = (a[:, None] * b[None, :] * v.sum()).to(dtype)
    num_wrong = sum(_count_wrong(_multiply(left, right), expected) for _ in range(PRODUCTS))
    if not num_wrong:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"{num_wrong:,} of {PRODUCTS * size**2:,} elements of products in {name} are wrong"


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def _count_wrong(found: Tensor, expected: Tensor) -> int:
    return int((found != expected).sum())


def _test_memory(device: torch.device) -> tuple[int, int]:
    """Write patterns to memory and read them back; return the number of bytes, and of words of 8 bytes that differ."""
    piece = 2**30
    total = MEMORY_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        total = int(MEMORY_SHARE * free)
    pieces = [_write(min(piece, total - start) // 8, device) for start in range(0, total, piece)]
    num_wrong = 0
    for pattern in PATTERNS:
        for words in pieces:
            words.fill_(pattern)
        num_wrong += sum(_read_back(words, pattern) for words in pieces)
    del pieces
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return total // 8 * 8, num_wrong


def _write(num_words: int, device: torch.device) -> Tensor:
    return torch.empty(num_words, dtype=torch.int64, device=device)


def _read_back(words: Tensor, pattern: int) -> int:
    """Return the number of words that differ from a pattern."""
    return int((words != pattern).sum())
