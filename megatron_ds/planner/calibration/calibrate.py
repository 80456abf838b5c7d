"""A profile of this machine by measurements: its products, attention, streams, collectives and messages."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product as combinations
from pathlib import Path

import torch

from megatron_ds.atomic import replacing
from megatron_ds.config.yaml_text import format_yaml
from megatron_ds.engine import device_count, device_type, preload, start_distributed
from megatron_ds.errors import ConfigError
from megatron_ds.parallel.grid import Layout, create_grid
from megatron_ds.parallel.launch import RankInfo, run_local
from megatron_ds.planner.calibration import measure_collectives, measure_host, measure_operations
from megatron_ds.planner.operations import Attention, Collective, CollectiveKind, Message, Product, Stream
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.from_measurements import Facts, build_device
from megatron_ds.planner.profiles.link import MeasuredTime

MOST_RANKS = 8
"""Ranks of a machine without GPUs, if nobody says how many."""
TIMEOUT_S = 3600.0
_KB = 1 << 10


@dataclass(frozen=True)
class Sizes:
    """Sizes of operations to measure.

    Attributes:
        products: of one rank.
        attention: of one rank.
        streams: of one rank.
        buffers: bytes of collectives and messages.
        steady_s: seconds of products without a pause, on a GPU.
        has_host: the host is measured by steps of small models, on a CPU; see `measure_host`.
    """

    products: Sequence[Product]
    attention: Sequence[Attention]
    streams: Sequence[Stream]
    buffers: Sequence[int]
    steady_s: float = 3.0
    has_host: bool = True


def usual_sizes(device: str) -> Sizes:
    """Return the sizes that a calibration measures, from a layer's smallest to its largest, on "cpu" or "cuda"."""
    on_cpu = device == "cpu"  # most of which compute bf16 slowly
    most_flops = {"float32": 1.2e9, "bfloat16": 1e8} if on_cpu else {"float32": 5e11, "bfloat16": 5e12}
    rows = (32, 128, 512, 2048) if on_cpu else (128, 1024, 4096, 16384)
    columns = (64, 256, 1024, 4096) if on_cpu else (128, 1024, 4096, 16384)
    inner = (64, 256, 512, 1024) if on_cpu else (128, 1024, 4096, 16384)
    scale = 1 if on_cpu else 8
    batches = [(scale * m, scale * m, k, batch) for m in (64, 128, 256) for k in (64, 128) for batch in (4, 16)]
    batches += [(scale * m, scale * n, 512, 8) for m in (64, 256) for n in (512, 1024)]
    products = [
        *(Product(m, n, k, dtype=dtype) for dtype in DTYPES for m, n, k in combinations(rows, columns, inner)),
        *(Product(*sizes, dtype=dtype) for dtype in DTYPES for sizes in batches),
    ]
    products = [one for one in products if one.flops <= most_flops[one.dtype]]
    if on_cpu:
        products += [Product(*sizes, dtype="float32") for sizes in LARGE_PRODUCTS]
    attention = [one for dtype in DTYPES for one in _attention_sizes(dtype, device)]
    stream_bytes = STREAM_BYTES if on_cpu else (*STREAM_BYTES, *LARGE_STREAM_BYTES)
    streams = [Stream(num_bytes, name=name) for name in measure_operations.STREAMS for num_bytes in stream_bytes]
    buffers = [4**power * _KB for power in range(9 if on_cpu else 11)]
    return Sizes(products, attention, streams, buffers)


LARGE_PRODUCTS = ((2048, 2048, 1024), (256, 32768, 512), (256, 512, 32768), (32768, 512, 256))
"""Sizes of a CPU's largest products, which are those of an output head: its logits, and both of its gradients."""


def _attention_sizes(dtype: str, device: str) -> list[Attention]:
    """Return attention to measure on "cpu" or "cuda": causal, and between all pairs."""
    if device == "cuda":
        lengths = [(length, heads) for length in (512, 2048, 8192) for heads in (8, 32)]
        return _attention_of(dtype, lengths, lengths[:4], (64, 128))
    if dtype == "float32":
        causal = [(64, 32), (128, 32), (256, 32), (512, 8), (512, 32), (1024, 8), (2048, 2)]
        full = [(128, 32), (512, 32), (1024, 2)]
        usual = _attention_of(dtype, causal, full, (32, 64, 128)) + _attention_of(dtype, [(4096, 2)], [], (64,))
        return usual + [replace(one, masked=True) for one in _attention_of(dtype, [], full[1:], (64, 128))]
    return _attention_of(dtype, [(64, 8), (256, 8)], [], (64, 128))


def _attention_of(
    dtype: str, causal: Sequence[tuple[int, int]], full: Sequence[tuple[int, int]], head_dims: Sequence[int]
) -> list[Attention]:
    """Return attention forward and backward.

    More than 8 heads on a CPU are those of several rows: the more rows and heads, the further apart the positions of
    one head are in memory.

    Args:
        dtype: of it.
        causal, full: lengths with the number of heads of all rows.
        head_dims: sizes of a head.
    """
    pairs = [(length, heads, length * (length + 1) // 2) for length, heads in causal]
    pairs += [(length, heads, length**2) for length, heads in full]
    return [
        Attention(1, heads, max(1, heads // 4), head_dim, length, length, count, backward, dtype)
        for backward in (False, True)
        for head_dim in head_dims
        for length, heads, count in pairs
    ]


STREAM_BYTES = (16 * _KB, 64 * _KB, 256 * _KB, *(2**power * _KB for power in range(9, 15)), 65536 * _KB)
"""Bytes of the streams that are measured; a CPU's caches end between the larger ones."""
LARGE_STREAM_BYTES = (1 << 28, 1 << 30)
"""Further ones of GPUs, whose caches hold tensors of up to some 100 MB."""
DTYPES = ("float32", "bfloat16")
"""Precisions that are measured."""


def calibrate(name: str, ranks: int | None = None, sizes: Sizes | None = None, budget_s: float = math.inf) -> Device:
    """Return the measured profile of this machine. It takes two to four minutes.

    All ranks compute at the same time, as in a run: they share the memory and, on a CPU, the cores.

    Args:
        name: of the profile.
        ranks: of a run on this machine; None = its number of GPUs, or of cores up to `MOST_RANKS`.
        sizes: of what is measured; None = `usual_sizes`.
        budget_s: see `measure_operations.time_in_rounds`.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking
    kind = device_type()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if ranks is None:
        ranks = device_count() if kind == "cuda" else min(cores, MOST_RANKS)
    if kind == "cuda" and ranks > device_count():
        raise ConfigError(f"--gpus-per-node={ranks}: this machine has {device_count()}; nearest: {device_count()}")
    preload()
    sizes = sizes or usual_sizes(kind)
    measure = partial(_measure, sizes=sizes, threads=max(1, cores // ranks), budget_s=budget_s)
    found = run_local(measure, ranks, TIMEOUT_S)
    times_s = [statistics.median(column) for column in zip(*(one.times_s for one in found))]
    operations = _operations(sizes)
    first, timed = found[0], list(zip(operations, times_s))
    steady = statistics.median(one.steady for one in found)
    device = build_device(name, first.facts, timed, first.communication, first.skew, steady)
    return measure_host.with_host_times(device, first.blocks_s, ranks) if first.blocks_s else device


def write_profile(device: Device, path: Path) -> None:
    """Write a profile that `find_device` reads."""
    fields = device.model_dump(exclude_defaults=True, exclude={"name"}, mode="json")
    with replacing(path) as part:
        part.write_text(format_yaml(fields), encoding="utf-8")


@dataclass(frozen=True)
class _Found:
    """The measurements of one rank."""

    facts: Facts
    times_s: list[float]
    communication: list[MeasuredTime]
    skew: float
    steady: float
    blocks_s: Mapping[int, float]


def _measure(info: RankInfo, sizes: Sizes, threads: int, budget_s: float) -> _Found:
    torch.set_num_threads(threads)
    device = start_distributed(info)
    world = create_grid(Layout(data=info.world_size), info.rank).world
    communication, skew = [], 0.0
    if info.world_size > 1:
        communication = measure_collectives.measured_times(
            collectives(sizes.buffers, world.size, device.type), world, device
        )
    if info.world_size > 1 and device.type == "cpu":
        usual = [one for one in sizes.products if (one.m, one.n, one.k) not in LARGE_PRODUCTS]
        compute = measure_operations.prepare(max(usual, key=_by_size_in_fp32), device)[0]
        skew = measure_collectives.measure_skew(world, device, compute)
    in_rounds = measure_operations.time_in_rounds(_operations(sizes), device, budget_s=budget_s)
    times_s = [measure_operations.undisturbed(one) for one in in_rounds]
    steady = measure_operations.steady_share(in_rounds)
    if device.type == "cuda":
        largest = max((one for one in sizes.products if one.dtype == "bfloat16"), key=lambda one: one.flops)
        steady = measure_operations.steady_speed(largest, device, sizes.steady_s)
    blocks_s = measure_host.measure_blocks(info, device) if device.type == "cpu" and sizes.has_host else {}
    return _Found(_facts(device, info.world_size, threads), times_s, communication, skew, steady, blocks_s)


def _by_size_in_fp32(product: Product) -> tuple[bool, int]:
    """Return a key by which the largest product in fp32 is the largest."""
    return product.dtype == "float32", product.flops


def _operations(sizes: Sizes) -> list[Product | Attention | Stream]:
    return [*sizes.products, *sizes.attention, *sizes.streams]


def collectives(buffers: Sequence[int], ranks: int, device: str) -> list[Collective | Message]:
    """Return the collectives and messages to measure on "cpu" or "cuda"."""
    kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
    found: list[Collective | Message] = [
        Collective(kind, "data", num_bytes, ranks) for kind in kinds for num_bytes in buffers
    ]
    if device == "cpu":
        found += [
            Collective(kind, measure_collectives.NEIGHBOURS, size, ranks) for kind in kinds[:3] for size in buffers
        ]
    return found + [Message("pipeline", num_bytes) for num_bytes in buffers]


def _facts(device: torch.device, ranks: int, threads: int) -> Facts:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Facts("cuda", properties.name, properties.multi_processor_count, properties.total_memory, ranks)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Facts("cpu", None, threads, memory_bytes // ranks, ranks)
