"""Seconds of steps, against sums and closed forms."""

from dataclasses import replace
from math import log, sqrt

import pytest

from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.operations import (
    Attention,
    Collective,
    HostCopy,
    LayerTrace,
    Message,
    ModuleHooks,
    Product,
    Stream,
    Work,
)
from megatron_ds.planner.pipeline.stragglers import RandomSlowness
from megatron_ds.planner.pipeline.timetable import slowdown
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.timing.links import seconds as link_seconds
from megatron_ds.planner.timing.pass_time import CONTENTION, Machine, pass_time
from megatron_ds.planner.timing.placement import Placement, place
from megatron_ds.planner.timing.roofline import seconds
from megatron_ds.planner.timing.step_time import STRAGGLING, StepTime, time_step
from megatron_ds.planner.timing.step_work import EndWork, StageWork, StepWork

DEVICE = find_device("h100", measured=False)
CPU = find_device("cpu")
LAYOUT = Layout(tensor=4, pipeline=4, context=1, data=2)
MACHINE = Machine(DEVICE, find_network("400Gb/s", DEVICE, 8), place(LAYOUT, 8))
FORWARD = Product(4096, 8192, 8192)
REDUCTION = Collective("all_reduce", "tensor", 64 << 20, 4)
MICRO_BATCHES = 8


def layer(forward: Work, backward: Work, recompute: Work | None = None) -> LayerTrace:
    return LayerTrace("blocks.0", True, forward, backward, 0, 0, 0, 0, 0, recompute=recompute or Work())


def step(*layers: LayerTrace, **changes: object) -> StepWork:
    """Four stages of the same layers."""
    stages = [StageWork(layers) for _ in range(4)]
    work = StepWork(stages, {0: EndWork()}, 4, MICRO_BATCHES, tokens=1000, world_size=32, blocks=False)
    return replace(work, **changes)  # type: ignore[arg-type]


def plain(forward: int = 1, backward: int = 2) -> LayerTrace:
    return layer(Work({FORWARD: forward}), Work({FORWARD: backward}))


def check_sum(found: StepTime) -> None:
    assert sum(found.parts.values()) == pytest.approx(found.total_s)
    assert all(value >= 0 for value in found.parts.values())


def test_even_stages_by_closed_form() -> None:
    found, each = time_step(step(plain()), MACHINE), 3 * seconds(FORWARD, DEVICE)
    assert found.total_s == pytest.approx((MICRO_BATCHES + 3) * each)
    assert found.compute_s == pytest.approx(MICRO_BATCHES * each)
    assert found.bubble_s == pytest.approx(3 * each)
    assert found.tokens_per_s == pytest.approx(1000 / found.total_s)
    flops = 3 * FORWARD.flops * 4 * MICRO_BATCHES * 8  # stages, micro-batches, pipelines
    assert found.mfu == pytest.approx(flops / (found.total_s * 32 * DEVICE.peak_flops("bfloat16")))
    assert found.hfu == found.mfu
    check_sum(found)


def test_recomputation_is_a_part_of_its_own() -> None:
    again = layer(Work({FORWARD: 1}), Work({FORWARD: 3}), Work({FORWARD: 1}))
    found, without = time_step(step(again), MACHINE), time_step(step(plain()), MACHINE)
    assert found.recompute_s == pytest.approx(MICRO_BATCHES * seconds(FORWARD, DEVICE))
    assert found.compute_s == pytest.approx(without.compute_s)
    assert found.hfu == pytest.approx(found.mfu * 4 / 3)
    check_sum(found)


def test_attention_counts_in_full_for_the_utilization() -> None:
    half = Attention(2, 8, 8, 128, 1024, 1024, pairs=1024 * 1025 // 2)
    work = layer(Work({half: 1}), Work({replace(half, backward=True): 1}))
    found = time_step(step(work), MACHINE)
    full = 12 * 128 * 1024 * 1024 * 2 * 8
    assert found.mfu * found.total_s * 32 * DEVICE.peak_flops("bfloat16") == pytest.approx(full * 4 * MICRO_BATCHES * 8)


def test_exposed_communication_adds_and_hidden_communication_slows_down() -> None:
    alone, sent = seconds(FORWARD, DEVICE), link_seconds(REDUCTION, MACHINE.placements["tensor"], MACHINE.network)
    exposed = pass_time(Work({FORWARD: 1, REDUCTION: 1}), MACHINE)
    assert exposed.compute_s == pytest.approx(alone)
    assert exposed.exposed_s == {"tensor": pytest.approx(sent)}
    hidden = replace(REDUCTION, hidden=True)
    assert sent < alone, "the case needs a longer product"
    assert pass_time(Work({FORWARD: 1, hidden: 1}), MACHINE).exposed_s == {"tensor": pytest.approx(CONTENTION * sent)}
    assert alone < 8 * sent, "the case needs a shorter product"
    waits = pass_time(Work({FORWARD: 1, hidden: 8}), MACHINE).exposed_s["tensor"]
    assert waits == pytest.approx(8 * sent - alone + CONTENTION * alone)
    nothing_left = pass_time(Work({FORWARD: 1, hidden: 8}), MACHINE, hidden_by_s=8 * sent).exposed_s["tensor"]
    assert nothing_left == pytest.approx(CONTENTION * 8 * sent)


def test_a_step_is_not_faster_than_its_host_starts_kernels() -> None:
    many = Work({Stream(1 << 10): 1000})
    slow = replace(MACHINE, device=DEVICE.model_copy(update={"host_us": 20.0}))
    assert pass_time(many, slow).compute_s == pytest.approx(1000 * 20e-6)


def test_hooks_of_modules_keep_the_host_busy() -> None:
    work = Work({FORWARD: 1, ModuleHooks(): 1000})
    slow = replace(MACHINE, device=DEVICE.model_copy(update={"host_us": 20.0, "hook_us": 500.0}))
    assert pass_time(work, slow).compute_s == pytest.approx(20e-6 + 1000 * 500e-6)
    assert pass_time(Work({FORWARD: 1000, ModuleHooks(): 1}), slow).compute_s == 1000 * seconds(FORWARD, DEVICE)


def test_a_cpu_is_its_own_host_and_hides_nothing() -> None:
    """It starts an operation before it computes it, and what it sends takes its time."""
    cpu = replace(MACHINE, device=CPU.model_copy(update={"host_us": 20.0, "hook_us": 500.0, "skew": 0.0}))
    alone, sent = seconds(FORWARD, CPU), link_seconds(REDUCTION, MACHINE.placements["tensor"], MACHINE.network)
    found = pass_time(Work({FORWARD: 3, ModuleHooks(): 2, replace(REDUCTION, hidden=True): 1}), cpu)
    assert found.compute_s == pytest.approx(3 * (alone + 20e-6) + 2 * 500e-6)
    assert found.exposed_s == {"tensor": pytest.approx(sent)}


def test_ranks_that_wait_for_each_other_take_longer() -> None:
    disturbed = replace(MACHINE, device=DEVICE.model_copy(update={"skew": 0.05}))
    together, alone = Work({FORWARD: 1, REDUCTION: 1}), Work({FORWARD: 1, replace(REDUCTION, hidden=True): 1})
    more_s = pass_time(together, disturbed).exposed_s["tensor"] - pass_time(together, MACHINE).exposed_s["tensor"]
    assert more_s == pytest.approx(0.05 * seconds(FORWARD, DEVICE))
    assert pass_time(alone, disturbed) == pass_time(alone, MACHINE), "nobody waits for what is hidden"


def test_copies_to_the_host_hide_behind_computation() -> None:
    compute_s, rate = seconds(FORWARD, DEVICE), DEVICE.host_gb_s * 1e9
    half, twice = (HostCopy(int(share * compute_s * rate), to_host=True) for share in (0.5, 2.0))
    assert not pass_time(Work({FORWARD: 1, half: 1}), MACHINE).exposed_s
    assert pass_time(Work({FORWARD: 1, twice: 1}), MACHINE).exposed_s["host copies"] == pytest.approx(
        compute_s, rel=1e-3
    )
    waited = pass_time(Work({FORWARD: 1, replace(half, hidden=False): 1}), MACHINE).exposed_s["host copies"]
    assert waited == pytest.approx(0.5 * compute_s, rel=1e-3)
    counted = Collective("all_reduce", "host", 1 << 20, 8)  # the engine's own axis of numbers in host memory
    machine = replace(MACHINE, placements={**MACHINE.placements, "host": Placement(8, 1, 8)})
    both = pass_time(Work({FORWARD: 1, twice: 1, counted: 1}), machine).exposed_s
    assert both["host"] == pass_time(Work({counted: 1}), machine).exposed_s["host"] > 0


def test_older_attention_kernels_are_slower() -> None:
    one = Attention(2, 8, 8, 128, 4096, 4096, pairs=4096 * 4097 // 2)
    older = replace(MACHINE, attention_speed=(0.5, 0.25))
    assert pass_time(Work({one: 1}), older).compute_s == pytest.approx(2 * seconds(one, DEVICE))
    back = replace(one, backward=True)
    assert pass_time(Work({back: 1}), older).compute_s == pytest.approx(4 * seconds(back, DEVICE))


def test_end_of_a_step() -> None:
    """The slowest rank's end counts; what is hidden runs behind the passes of one micro-batch."""
    gather = Collective("all_gather", "shard", 1 << 30, 2)
    update = Work({Stream(1 << 30): 1})
    sent_s = link_seconds(gather, MACHINE.placements["shard"], MACHINE.network)
    ends = {0: EndWork(Work({gather: 1}), 1, update), 3: EndWork()}
    found = time_step(step(plain(), ends=ends), MACHINE)
    assert found.optimizer_s == pytest.approx(seconds(update, DEVICE))
    assert found.exposed_s == {"shard": pytest.approx(sent_s)}
    check_sum(found)
    hidden = EndWork(Work({replace(gather, hidden=True): 1}), 1, update)
    long = time_step(step(plain(20, 40), ends={0: hidden}), MACHINE)
    assert long.exposed_s["shard"] == pytest.approx(CONTENTION * sent_s)


def test_messages_that_block_are_communication_of_the_pipeline() -> None:
    sends = Work({Message("pipeline", 64 << 20): 1})
    stages = [StageWork([plain()], sends=sends if index < 3 else Work()) for index in range(4)]
    blocking = time_step(step(plain(), stages=stages, blocks=True), MACHINE)
    assert blocking.exposed_s["pipeline"] > 0
    check_sum(blocking)
    free = time_step(step(plain(), stages=stages, blocks=False, schedule="1f1b"), MACHINE)
    assert "pipeline" not in free.exposed_s
    assert free.total_s < blocking.total_s


def test_interleaved_stages() -> None:
    stages = [StageWork([plain()]) for _ in range(8)]
    found = time_step(step(plain(), stages=stages, schedule="interleaved"), MACHINE)
    each = 3 * seconds(FORWARD, DEVICE)
    assert found.total_s == pytest.approx((2 * MICRO_BATCHES + 3) * each)


def test_the_slowest_node_counts() -> None:
    found, one = time_step(step(plain(), nodes=100), MACHINE), time_step(step(plain()), MACHINE)
    assert found.straggling_s == pytest.approx(STRAGGLING * sqrt(2 * log(100)) * one.total_s)
    check_sum(found)


def test_given_slowness_takes_the_place_of_the_slowest_node() -> None:
    """Devices of 5 % lengthen the pipeline, the same for 100 nodes as for one; more ranks that wait, more."""
    slow = RandomSlowness(device_variance=0.05**2)
    wide = slow.at(Layout(tensor=8, pipeline=4, context=2, data=2))
    assert (wide.devices, wide.replicas) == (16, 2)
    at = slow.at(LAYOUT)
    found, even = time_step(step(plain(), nodes=100), MACHINE, at), time_step(step(plain()), MACHINE)
    assert found.straggling_s == pytest.approx((slowdown(even.timetable, at) - 1) * even.total_s)
    assert 0.05 * even.total_s < found.straggling_s < time_step(step(plain()), MACHINE, wide).straggling_s
    assert time_step(step(plain(), nodes=100), MACHINE, RandomSlowness().at(LAYOUT)).straggling_s == 0
    check_sum(found)


def test_waits_for_data_and_checkpoints() -> None:
    saved = Work({HostCopy(int(DEVICE.host_gb_s * 1e9), to_host=True, hidden=False): 1})
    waiting = step(plain(), data_s=0.5, saved=saved, save_every=4)
    found, one = time_step(waiting, MACHINE), time_step(step(plain()), MACHINE)
    assert found.total_s == pytest.approx(one.total_s + 0.75)
    assert found.parts["data"] == 0.5 and found.parts["checkpoints"] == 0.25


def test_gradients_that_are_added_apart_take_time_in_each_backward_pass() -> None:
    added = Work({Stream(1 << 30): 1})
    stages = [StageWork([plain()], gradients=added) for _ in range(4)]
    found, without = time_step(step(plain(), stages=stages), MACHINE), time_step(step(plain()), MACHINE)
    assert found.compute_s - without.compute_s == pytest.approx(MICRO_BATCHES * seconds(added, DEVICE))


def test_links_between_nodes_are_slower() -> None:
    far = replace(MACHINE, placements={**MACHINE.placements, "tensor": Placement(4, 4, 1)})
    work = layer(Work({FORWARD: 1, REDUCTION: 1}), Work({FORWARD: 2}))
    assert time_step(step(work), far).exposed_s["tensor"] > 2 * time_step(step(work), MACHINE).exposed_s["tensor"]
