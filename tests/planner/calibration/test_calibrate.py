"""Measured profiles: they predict operations that were not measured, are written, and are read again.

The machine of the tests is shared: the processor time of one thread counts for what a rank computes, which others do
not lengthen, and the lower quartile for what ranks send.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_ds.engine import start_distributed, stop_distributed
from megatron_ds.parallel.grid import Layout, create_grid
from megatron_ds.parallel.launch import RankInfo
from megatron_ds.planner.calibration import measure_collectives, measure_operations
from megatron_ds.planner.calibration.calibrate import Sizes, calibrate, collectives, usual_sizes, write_profile
from megatron_ds.planner.operations import Attention, Collective, Message, Product, Stream
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.profiles.from_measurements import Facts, build_device
from megatron_ds.planner.profiles.link import MeasuredTime
from megatron_ds.planner.timing import links, roofline
from megatron_ds.planner.timing.placement import Placement
from tests.ranks import preload, run_alone, run_local_ranks

FACTS = Facts("cpu", None, 1, 8 << 30, 1)
TOLERANCE = 0.15
TRIES = 8
Operation = Product | Attention | Stream

PRODUCTS = [
    Product(m, n, k, batch, "float32")
    for m, n, k, batch in (
        (512, 512, 512, 1),
        (1024, 1408, 512, 1),
        (100, 768, 768, 1),
        (2048, 1024, 192, 1),
        (64, 4096, 512, 1),
        (300, 300, 300, 1),
        (128, 128, 64, 8),
    )
]
ATTENTION = [
    Attention(1, 8, 8, head_dim, length, length, length * (length + 1) // 2, backward, "float32")
    for backward in (False, True)
    for head_dim, length in ((64, 128), (96, 200), (128, 100))
]
STREAMS = [Stream(num_bytes, name=name) for name in ("", "silu", "_softmax") for num_bytes in (700_000, 2_500_000)]


def timed(operations: Sequence[Operation], rounds: int) -> list[float]:
    torch.set_num_threads(1)
    in_rounds = measure_operations.time_in_rounds(operations, torch.device("cpu"), rounds, clock=time.thread_time)
    return [measure_operations.undisturbed(one) for one in in_rounds]


def off(ratios: dict[object, float]) -> dict[object, float]:
    """Those ratios of predicted and measured time that are further from 1 than the tolerance."""
    return {one: ratio for one, ratio in ratios.items() if not 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE}


SIZES = usual_sizes("cpu")
CASES: dict[str, tuple[list[Operation], list[Operation]]] = {
    "products": ([one for one in SIZES.products if one.dtype == "float32"], [*PRODUCTS]),
    "attention": ([one for one in SIZES.attention if one.dtype == "float32" and one.queries < 1024], [*ATTENTION]),
    "streams": (
        [one for one in SIZES.streams if one.name in {two.name for two in STREAMS} and one.num_bytes <= 16 << 20],
        [*STREAMS],
    ),
}
"""Kind of operation -> those that are measured for a profile, and those that it predicts."""
BASE: list[tuple[Operation, float]] = [(Product(64, 64, 64, dtype="float32"), 1e-5), (Stream(1000), 1e-6)]
"""Every profile has a product and a stream."""


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["products", "attention", "streams"])
def test_a_profile_predicts_operations_that_were_not_measured(kind: str) -> None:
    known, unknown = CASES[kind]
    wrong: dict[object, float] = {}
    tries: list[list[float]] = []
    while len(tries) < TRIES:
        tries.append(run_alone(partial(timed, [*known, *unknown], 3)))
        times_s = [min(times) for times in zip(*tries)]  # others use the caches too, which never makes it faster
        table = list(zip(known, times_s))
        base = BASE[1:] if kind == "products" else BASE[:1] if kind == "streams" else BASE
        device = build_device("here", FACTS, [*base, *table], [])
        measured = dict(zip(unknown, times_s[len(known) :]))
        wrong = off({one: roofline.seconds(one, device) / time_s for one, time_s in measured.items()})
        if not wrong:
            return
    raise AssertionError(wrong)


def timed_ranks(info: RankInfo, operations: Sequence[Collective | Message]) -> list[float]:
    torch.set_num_threads(1)
    device = start_distributed(info)
    world = create_grid(Layout(data=info.world_size), info.rank).world
    times_s = measure_collectives.measure(operations, world, device, rounds=15)
    stop_distributed()
    return times_s


@pytest.mark.sweep
def test_a_profile_predicts_collectives_of_other_sizes() -> None:
    known = collectives(usual_sizes("cpu").buffers, 2, "cpu")
    unknown = collectives([200_000, 1_500_000, 12_000_000], 2, "cpu")
    wrong: dict[object, float] = {}
    tries: list[list[float]] = []
    while len(tries) < TRIES:
        tries.append(run_local_ranks(timed_ranks, 2, [*known, *unknown])[0])
        times_s = [min(times) for times in zip(*tries)]
        rows = [
            MeasuredTime(
                kind=one.kind if isinstance(one, Collective) else "message",
                axis="neighbours" if one.axis == "neighbours" else None,
                ranks=2,
                num_bytes=one.num_bytes,
                us=time_s * 1e6,
            )
            for one, time_s in zip(known, times_s)
        ]
        device = build_device("here", FACTS, BASE, rows)
        network = find_network("ethernet 10Gb/s", device, 2)
        measured = dict(zip(unknown, times_s[len(known) :]))
        wrong = off({one: links.seconds(one, Placement(2, 1, 2), network) / time_s for one, time_s in measured.items()})
        if not wrong:
            return
    raise AssertionError(wrong)


SMALL = Sizes(
    products=[Product(m, 64, 64, dtype=dtype) for m in (16, 64) for dtype in ("float32", "bfloat16")],
    attention=[Attention(1, 2, 1, 16, 32, 32, 32 * 33 // 2, backward, "float32") for backward in (False, True)],
    streams=[Stream(4096, name=name) for name in measure_operations.STREAMS],
    buffers=[1024, 65536],
    has_host=False,
)


def test_the_mean_counts_beside_the_undisturbed_times() -> None:
    times_s = [[1.0, 1.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0]]
    assert [measure_operations.undisturbed(one) for one in times_s] == [1.0, 3.0]
    assert measure_operations.steady_share(times_s) == pytest.approx(4 / 4.2)
    assert measure_operations.steady_share([[1.0], [2.0]]) == 1.0, "one round knows of no disturbance"


def test_attention_with_a_mask_is_measured_beside_the_same_without() -> None:
    attention = set(usual_sizes("cpu").attention)
    masked = {one for one in attention if one.masked}
    assert {one.backward for one in masked} == {False, True}
    assert {replace(one, masked=False) for one in masked} <= attention
    small = [Attention(1, 2, 2, 16, 32, 32, 32 * 32, backward, "float32", masked=True) for backward in (False, True)]
    assert min(run_alone(timed, small, 1)) > 0


def test_a_calibrated_machine_is_written_and_read_again(tmp_path: Path) -> None:
    preload()
    device = calibrate("machine", 2, SMALL)
    path = tmp_path / "machine.yaml"
    write_profile(device, path)
    again = find_device(str(path))
    assert again == device
    assert device.source.startswith("Measured on 2") and "2 ranks" in device.source
    assert {one.name for one in device.measured_streams} == set(measure_operations.STREAMS)
    for row in device.measured_products:
        product = Product(row.m, row.n, row.k, dtype=row.dtype)
        assert roofline.product_s(product, again) * 1e6 == pytest.approx(row.us, rel=0.05)
    network = find_network("ethernet 10Gb/s", again, 2)
    kinds = {(one.kind, one.axis) for one in network.inside.measured}
    assert len(kinds) == 5 + 3 + 1 and ("all_gather", "neighbours") in kinds and ("message", None) in kinds
    for one in collectives(SMALL.buffers, 2, "cpu"):
        time_s = links.seconds(one, Placement(2, 1, 2), network)
        assert 1e-6 < time_s < 1.0, one
        assert links.seconds(one, Placement(2, 2, 1), network) > 50e-6, "another machine, through its network card"


def test_a_machine_of_one_rank_has_no_measured_link() -> None:
    preload()
    device = calibrate("machine", 1, Sizes(SMALL.products[:1], [], SMALL.streams[:1], [1024], has_host=False))
    assert (
        device.link == "gloo"
        and device.network.startswith("ethernet")
        and device.products.num_cores == 1
        and device.memory_bytes > 1 << 28
    )


def test_usual_sizes_fit_each_device() -> None:
    cpu, cuda = usual_sizes("cpu"), usual_sizes("cuda")
    assert sum(one.flops for one in cpu.products) * 15 / 50e9 < 30, "seconds on a core, with all layouts and rounds"
    assert max(one.flops for one in cuda.products) > 1e12 and max(cuda.buffers) == 1 << 30
    for sizes in (cpu, cuda):
        assert {one.name for one in sizes.streams} == set(measure_operations.STREAMS)
        assert len(set(sizes.products)) == len(sizes.products) > 60


def _speed_of_a_device_that_slows_down() -> float:
    readings, reading_s = 0, 0.0

    def clock() -> float:  # what lies between two readings takes 2 ms, and from the tenth on 2.5 ms
        nonlocal readings, reading_s
        readings, reading_s = readings + 1, reading_s + (2e-3 if readings < 10 else 2.5e-3)
        return reading_s

    device = torch.device("cpu")
    return measure_operations.steady_speed(Product(8, 8, 8, dtype="float32"), device, 0.04, clock)


def test_the_speed_of_long_runs_is_that_of_their_second_half() -> None:
    assert run_alone(_speed_of_a_device_that_slows_down) == pytest.approx(0.8)
