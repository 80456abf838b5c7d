"""Seconds of products, attention and streams on a device (Williams et al. 2009, "Roofline").

A formula gives the time by the device's peaks. Where the profile has measured times of the same kind, they correct the
formula: exactly at the measured sizes, smoothly between them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from math import ceil
from statistics import fmean

from megatron_ds.planner.operations import Attention, Operation, Product, Stream, Work
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.link import GB, US
from megatron_ds.planner.timing.measured_times import Curve, Surface

_BYTES = {"float32": 4, "tf32": 4, "float64": 8}


def seconds(work: Work | Operation, device: Device) -> float:
    """Return the seconds that a device computes; communication takes none here (see `links`).

    Args:
        work: operations, or one.
        device: its profile.
    """
    if isinstance(work, Work):
        return sum(count * seconds(one, device) for one, count in work.items())
    steady = device.steady if device.type == "cpu" else 1.0
    match work:
        case Product():
            return product_s(work, device) / steady
        case Attention():
            return attention_s(work, device) / steady
        case Stream():
            return stream_s(work, device) / steady
    return 0.0


@lru_cache(maxsize=1 << 18)
def product_s(product: Product, device: Device, extra_bytes: int = 0) -> float:
    """Return the seconds of a product; on a CPU, as in `attention_s` and `stream_s`, of one that nothing disturbs.

    Args:
        product: its sizes.
        device: its profile.
        extra_bytes: read and written beyond the factors and the result, for example by a sum into fp32.
    """
    by_formula = _product_by_formula(product, device, extra_bytes)
    surface = _product_surface(device, product.dtype)
    if surface is None:
        return by_formula
    return by_formula * surface.factor(_sizes_of_product(product)) + _lost_to_power_s(product, device)


@lru_cache(maxsize=1 << 16)
def attention_s(attention: Attention, device: Device) -> float:
    """Return the seconds of fused attention."""
    by_formula = _attention_by_formula(attention, device)
    surface = _attention_surface(device, attention.dtype, attention.backward)
    if surface is None:
        return by_formula
    found = by_formula * surface.factor(_sizes_of_attention(attention)) + _lost_to_power_s(attention, device)
    return found * _mask_factor(device, attention.dtype, attention.backward) if attention.masked else found


@lru_cache(maxsize=1 << 18)
def stream_s(stream: Stream, device: Device) -> float:
    """Return the seconds of a stream; several launches share its bytes equally.

    A function that changes its argument in place ("exp_") is timed as the one that does not ("exp"), if the profile has
    that one alone.
    """
    curves = _stream_curves(device)
    curve = curves.get(stream.name) or curves.get(stream.name.rstrip("_")) or curves.get("")
    if curve is not None and stream.launches:
        return stream.launches * curve.seconds(stream.num_bytes / stream.launches)
    return stream.launches * device.streams.launch_us * US + stream.num_bytes / memory_bandwidth(device)


def memory_bandwidth(device: Device) -> float:
    """Return the bytes per second that large streams reach."""
    return device.memory_gb_s * GB * device.streams.share


def _product_by_formula(product: Product, device: Device, extra_bytes: int) -> float:
    """Return the seconds of whole tiles in whole waves, but at least those of the memory.

    Every core computes one tile of the result at a time; the last wave takes as long as the others.
    """
    speed = device.products
    per_core = device.peak_flops(product.dtype) * speed.sustained_of(product.dtype) / speed.num_cores
    largest = max(tile.m * tile.n for tile in speed.tiles)
    found = []
    for tile in speed.tiles:
        waves = ceil(ceil(product.m / tile.m) * ceil(product.n / tile.n) * product.batch / speed.num_cores)
        tile_s = 2 * tile.m * tile.n * product.k / (per_core * tile.speed)
        found.append(waves * (tile_s + speed.fill_us * US * tile.m * tile.n / largest))
    item = _BYTES.get(product.dtype, 1 if product.dtype.startswith("float8") else 2)
    moved = product.batch * (product.m * product.k + product.k * product.n + product.m * product.n) * item
    return device.streams.launch_us * US + max(min(found), (moved + extra_bytes) / memory_bandwidth(device))


def _attention_by_formula(attention: Attention, device: Device) -> float:
    speed = device.attention
    keys = attention.pairs / attention.queries
    share = speed.backward if attention.backward else speed.forward
    share *= keys / (keys + speed.fill_keys) * attention.head_dim / (attention.head_dim + speed.fill_dim)
    return device.streams.launch_us * US + attention.flops / (device.peak_flops(attention.dtype) * share)


def _lost_to_power_s(operation: Product | Attention, device: Device) -> float:
    """Return a GPU's seconds beyond the measured ones in long runs; what memory or a launch limits is as fast there."""
    best = _best_rate(device, operation.dtype)
    if device.type == "cpu" or device.steady == 1.0 or operation.dtype in _BYTES or best == 0.0:
        return 0.0
    return operation.flops / best * (1 / device.steady - 1)


@cache
def _best_rate(device: Device, dtype: str) -> float:
    """Return the FLOP/s of the fastest measured product of a dtype; 0 = none was measured."""
    rates = (
        Product(one.m, one.n, one.k, one.batch, dtype).flops / (one.us * US)
        for one in device.measured_products
        if one.dtype == dtype
    )
    return max(rates, default=0.0)


def _sizes_of_product(product: Product) -> tuple[float, ...]:
    return product.m, product.n, product.k, product.batch


def _sizes_of_attention(attention: Attention) -> tuple[float, ...]:
    return attention.rows * attention.heads, attention.head_dim, attention.queries, attention.pairs / attention.queries


@cache
def _product_surface(device: Device, dtype: str) -> Surface | None:
    measured = [
        (Product(one.m, one.n, one.k, one.batch, dtype), one.us)
        for one in device.measured_products
        if one.dtype == dtype
    ]
    if not measured:
        return None
    sizes = [_sizes_of_product(one) for one, _ in measured]
    return Surface.through(sizes, [us * US / _product_by_formula(one, device, 0) for one, us in measured])


@cache
def _attention_surface(device: Device, dtype: str, backward: bool) -> Surface | None:
    measured = _measured_attention(device, dtype, backward, masked=False)
    if not measured:
        return None
    sizes = [_sizes_of_attention(one) for one, _ in measured]
    return Surface.through(sizes, [us * US / _attention_by_formula(one, device) for one, us in measured])


@cache
def _mask_factor(device: Device, dtype: str, backward: bool) -> float:
    """Return by how much longer attention takes with a mask; 1 = it was not measured."""
    measured = _measured_attention(device, dtype, backward, masked=True)
    return fmean(us * US / attention_s(replace(one, masked=False), device) for one, us in measured) if measured else 1.0


def _measured_attention(device: Device, dtype: str, backward: bool, *, masked: bool) -> list[tuple[Attention, float]]:
    """Return measured attention with its microseconds."""
    return [
        (Attention(**one.model_dump(exclude={"us"})), one.us)
        for one in device.measured_attention
        if (one.dtype, one.backward, one.masked) == (dtype, backward, masked)
    ]


@cache
def _stream_curves(device: Device) -> dict[str, Curve]:
    by_name: dict[str, list[tuple[float, float]]] = {}
    for one in device.measured_streams:
        by_name.setdefault(one.name, []).append((one.num_bytes, one.us * US))
    return {name: Curve.through(points) for name, points in by_name.items()}
