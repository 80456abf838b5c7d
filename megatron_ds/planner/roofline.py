"""Seconds of products, attention and streams on a device (Williams et al. 2009, "Roofline")."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from megatron_ds.planner.operations import Attention, Operation, Product, Stream, Work
from megatron_ds.planner.profiles.device import Device

_BYTES = {"float32": 4, "tf32": 4, "float64": 8}


def seconds(work: Work | Operation, device: Device) -> float:
    """Return the seconds that a device computes; communication takes none here (see `links`).

    Args:
        work: operations, or one.
        device: its profile.
    """
    if isinstance(work, Work):
        return sum(count * seconds(one, device) for one, count in work.items())
    if isinstance(work, Product | Attention | Stream):
        return _seconds(work, device)
    return 0.0


@lru_cache(maxsize=1 << 18)
def _seconds(operation: Product | Attention | Stream, device: Device) -> float:
    if isinstance(operation, Product):
        return product_s(operation, device)
    if isinstance(operation, Attention):
        return attention_s(operation, device)
    return stream_s(operation, device)


def product_s(product: Product, device: Device) -> float:
    """Return the seconds of a product by the formula: whole tiles in whole waves, and never faster than the memory.

    Each core computes one tile of the result at a time; the last wave of tiles takes as long as a complete one.
    """
    speed = device.products
    per_core = device.peak_flops(product.dtype) * speed.sustained_of(product.dtype) / speed.num_cores
    found = []
    for tile_m, tile_n in speed.tiles:
        tiles = ceil(product.m / tile_m) * ceil(product.n / tile_n) * product.batch
        waves = ceil(tiles / speed.num_cores)
        found.append(waves * 2 * tile_m * tile_n * (product.k + speed.fill_k) / per_core)
    item = _BYTES.get(product.dtype, 1 if product.dtype.startswith("float8") else 2)
    moved = product.batch * (product.m * product.k + product.k * product.n + product.m * product.n) * item
    return device.streams.launch_us * 1e-6 + max(min(found), moved / _bandwidth(device))


def attention_s(attention: Attention, device: Device) -> float:
    """Return the seconds of fused attention by the formula."""
    speed = device.attention
    keys = attention.pairs / attention.queries
    share = speed.backward if attention.backward else speed.forward
    share *= keys / (keys + speed.fill_keys) * attention.head_dim / (attention.head_dim + speed.fill_dim)
    return device.streams.launch_us * 1e-6 + attention.flops / (device.peak_flops(attention.dtype) * share)


def stream_s(stream: Stream, device: Device) -> float:
    """Return the seconds of a stream by the formula."""
    return stream.launches * device.streams.launch_us * 1e-6 + stream.num_bytes / _bandwidth(device)


def _bandwidth(device: Device) -> float:
    return device.memory_gb_s * 1e9 * device.streams.share
