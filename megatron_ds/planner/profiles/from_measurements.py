"""Profiles made of measured times: the best of them are the device's speed, and all of them correct the formulas."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_ds.monitor import peak_flops
from megatron_ds.planner.operations import Attention, Product, Stream
from megatron_ds.planner.profiles.device import (
    GIB,
    AttentionSpeed,
    Device,
    MeasuredAttention,
    MeasuredProduct,
    MeasuredStream,
    ProductSpeed,
    StreamSpeed,
    Tile,
)
from megatron_ds.planner.profiles.link import GB, US, Link, MeasuredTime, Steps
from megatron_ds.planner.profiles.shipped import find_by_gpu

_DIGITS = 4
_CPU_LINK, _CPU_NETWORK = "gloo", "ethernet 10Gb/s"
_UNKNOWN_LINK, _UNKNOWN_NETWORK = "pcie4", "100Gb/s"


@dataclass(frozen=True)
class Facts:
    """Facts of a machine that need no measurement.

    Attributes:
        type: torch's device type.
        gpu: name of the GPUs.
        num_cores: multiprocessors of a GPU, or threads of a rank.
        memory_bytes: of a GPU, or of this machine for each rank.
        ranks: number of ranks that were measured at the same time.
    """

    type: Literal["cuda", "cpu"]
    gpu: str | None
    num_cores: int
    memory_bytes: int
    ranks: int


Timed = Sequence[tuple[Product | Attention | Stream, float]]


def build_device(
    name: str,
    facts: Facts,
    timed: Timed,
    communication: Sequence[MeasuredTime],
    skew: float = 0.0,
    steady: float = 1.0,
) -> Device:
    """Return the profile of a measured machine.

    Args:
        name: of the profile.
        facts: of the machine.
        timed: operations with their seconds; products in fp32 and a stream at least.
        communication: rows of the link between its ranks; empty if there is one rank.
        skew, steady: see `Device`.
    """
    products = [(one, time_s) for one, time_s in timed if isinstance(one, Product)]
    streams = [(one, time_s) for one, time_s in timed if isinstance(one, Stream)]
    attention = [(one, time_s) for one, time_s in timed if isinstance(one, Attention)]
    rates = {dtype: _best(products, dtype) for dtype in dict.fromkeys(one.dtype for one, _ in products)}
    known = peak_flops(facts.gpu, "bf16") if facts.gpu else None
    bytes_per_s = _bandwidth([one for one in streams if not one[0].name], cached=facts.gpu is None)
    launch_us = min(time_s for _, time_s in streams) / US
    alike = find_by_gpu(facts.gpu) if facts.gpu is not None else None
    link, network = _usual_links(facts, alike)
    not_measured: dict[str, Any] = {}
    if alike is not None:
        not_measured = {field: getattr(alike, field) for field in ("host_us", "hook_us", "host_gb_s", "island")}
    return Device(
        name=name,
        source=f"Measured on {datetime.date.today()}: {facts.ranks} ranks at the same time, {_whose(facts)}",
        type=facts.type,
        gpu=facts.gpu,
        tflops={
            **(alike.tflops if alike is not None else {}),
            **{dtype: _rounded(rate / 1e12) for dtype, rate in rates.items() if known is None or dtype == "float32"},
        },
        memory_gib=_rounded(facts.memory_bytes / GIB),
        memory_gb_s=_rounded(bytes_per_s / GB),
        skew=_rounded(skew),
        steady=_rounded(min(1.0, steady)),
        products=_product_speed(facts, rates, known, alike),
        attention=_attention_speed(attention, known or rates.get("bfloat16") or rates["float32"]),
        streams=StreamSpeed(share=1.0, launch_us=_rounded(launch_us)),
        link=_link(facts, communication) if communication else link,
        network=network,
        **not_measured,
        measured_products=tuple(MeasuredProduct(**asdict(one), us=_us(time_s)) for one, time_s in products),
        measured_attention=tuple(MeasuredAttention(**asdict(one), us=_us(time_s)) for one, time_s in attention),
        measured_streams=tuple(
            MeasuredStream(name=one.name, num_bytes=one.num_bytes, us=_us(time_s)) for one, time_s in streams
        ),
    )


def _best(products: Sequence[tuple[Product, float]], dtype: str) -> float:
    return max(one.flops / time_s for one, time_s in products if one.dtype == dtype)


def _bandwidth(streams: Sequence[tuple[Stream, float]], *, cached: bool) -> float:
    """Return the bytes per second of the largest stream, or, if caches count, of the fastest one."""
    largest = max(one.num_bytes for one, _ in streams)
    return max(one.num_bytes / time_s for one, time_s in streams if cached or one.num_bytes == largest)


def _whose(facts: Facts) -> str:
    return f"each with {facts.num_cores} threads." if facts.gpu is None else f"each on one {facts.gpu}."


def _product_speed(facts: Facts, rates: dict[str, float], known: float | None, alike: Device | None) -> ProductSpeed:
    """Return the best rates as shares of the peaks; a CPU has no tiles, and its peaks are its best rates."""
    if facts.gpu is None:
        return ProductSpeed(sustained=1.0, fill_us=0.0, num_cores=1, tiles=(Tile(m=1, n=1),))
    best = rates.get("bfloat16")
    sustained = min(1.0, best / known) if known is not None and best is not None else 1.0
    return ProductSpeed(
        sustained=_rounded(sustained),
        sustained_fp8=alike.products.sustained_fp8 if alike is not None else None,
        fill_us=4.0,
        num_cores=facts.num_cores,
    )


def _attention_speed(attention: Sequence[tuple[Attention, float]], peak: float) -> AttentionSpeed:
    def best(backward: bool) -> float:
        rates = [one.flops / time_s for one, time_s in attention if one.backward == backward]
        return _rounded(min(1.0, max(rates) / peak)) if rates else 0.5

    return AttentionSpeed(forward=best(False), backward=best(True), fill_keys=0.0, fill_dim=0.0)


def _usual_links(facts: Facts, alike: Device | None) -> tuple[Link | str, str]:
    """Return the link and the network that no measurement of one rank, or of one machine, shows."""
    if facts.gpu is None:
        return _CPU_LINK, _CPU_NETWORK
    return (alike.link, alike.network) if alike is not None else (_UNKNOWN_LINK, _UNKNOWN_NETWORK)


def _link(facts: Facts, communication: Sequence[MeasuredTime]) -> Link:
    """Return the link with its measured times; its formula, for other numbers of ranks, fits the two ends of them."""
    plain = [row for row in communication if row.axis is None]
    return Link(
        source=f"Measured between {facts.ranks} ranks of one machine.",
        ring=_steps([row for row in plain if row.kind == "all_reduce"]),
        message=_steps([row for row in plain if row.kind == "message"]),
        measured=tuple(row.model_copy(update={"us": _rounded(row.us)}) for row in communication),
    )


def _steps(rows: Sequence[MeasuredTime]) -> Steps:
    smallest, largest = (find(rows, key=lambda row: row.num_bytes) for find in (min, max))
    rounds = 1 if largest.kind == "message" else 2 * (largest.ranks - 1)
    chunk = largest.num_bytes / (1 if largest.kind == "message" else largest.ranks)
    return Steps(
        base_us=0.0,
        step_us=_rounded(smallest.us / rounds),
        gb_s=_rounded(rounds * chunk / (max(largest.us - smallest.us, largest.us / 2) * US) / GB),
    )


def _us(time_s: float) -> float:
    return _rounded(time_s / US)


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
