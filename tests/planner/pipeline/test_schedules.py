"""Orders of pipeline schedules, against DeepSpeed's own instructions and the rules of Megatron-LM."""

import numpy as np
import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedule

from megatron_ds.errors import TopologyError
from megatron_ds.planner.pipeline.schedules import BACKWARD, FORWARD, Order, num_buffers, order_of

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 7), (3, 2), (4, 8), (4, 3), (5, 9), (8, 16), (7, 3)]


def instructions_of(order: Order, num_ranks: int) -> list[tuple[str, int]]:
    """Names of DeepSpeed's instructions, and micro-batches, in the order of this rank."""
    found = []
    for at in range(order.directions.size):
        forward, number = order.directions[at] == FORWARD, int(order.micro_batches[at])
        stage = int(order.stages[at])
        compute, receive, send = (
            ("ForwardPass", "RecvActivation", "SendActivation") if forward else ("BackwardPass", "RecvGrad", "SendGrad")
        )
        found.append((4 * at, compute, number))
        if (stage > 0) if forward else (stage < num_ranks - 1):
            found.append((int(order.receive_at[at]), receive, number))
        if (stage < num_ranks - 1) if forward else (stage > 0):
            found.append((int(order.send_at[at]), send, number))
    assert len({moment for moment, *_ in found}) == len(found), "one message at a time"
    return [(name, number) for _, name, number in sorted(found)]


def instructions_of_deepspeed(rank: int, num_ranks: int, num_micro_batches: int) -> list[tuple[str, int]]:
    """The same, by `TrainSchedule`. Its instructions name buffers, which become micro-batches by counting."""
    schedule = deepspeed_schedule.TrainSchedule(num_micro_batches, num_ranks, rank)
    names = {"ForwardPass", "BackwardPass", "RecvActivation", "SendActivation", "RecvGrad", "SendGrad"}
    found: list[tuple[str, int]] = []
    for instruction in (one for step in schedule.steps() for one in step if type(one).__name__ in names):
        name = type(instruction).__name__
        number = sum(other == name for other, _ in found)
        assert instruction.buffer_id == number % schedule.num_pipe_buffers()
        found.append((name, number))
    return found


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), SIZES)
def test_deepspeed_instructions(num_ranks: int, num_micro_batches: int) -> None:
    for rank in range(num_ranks):
        order = order_of("deepspeed", rank, num_ranks, num_micro_batches)
        assert instructions_of(order, num_ranks) == instructions_of_deepspeed(rank, num_ranks, num_micro_batches)
        schedule = deepspeed_schedule.TrainSchedule(num_micro_batches, num_ranks, rank)
        assert num_buffers(rank, num_ranks, num_micro_batches) == schedule.num_pipe_buffers()


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), SIZES)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "deepspeed"])
def test_passes_and_those_in_flight(schedule: str, num_ranks: int, num_micro_batches: int) -> None:
    for rank in range(num_ranks):
        order = order_of(schedule, rank, num_ranks, num_micro_batches)
        for direction in (FORWARD, BACKWARD):
            assert order.micro_batches[order.directions == direction].tolist() == list(range(num_micro_batches))
        most = num_micro_batches if schedule == "gpipe" else min(num_micro_batches, num_ranks - rank)
        assert order.in_flight == most


@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches", "num_chunks"), [(2, 4, 2), (4, 16, 2), (4, 12, 3), (8, 32, 4)]
)
def test_interleaved_passes_and_those_in_flight(num_ranks: int, num_micro_batches: int, num_chunks: int) -> None:
    for rank in range(num_ranks):
        order = order_of("interleaved", rank, num_ranks, num_micro_batches, num_chunks)
        assert set(order.stages.tolist()) == set(range(rank, num_ranks * num_chunks, num_ranks))
        passes = set(zip(order.directions.tolist(), order.stages.tolist(), order.micro_batches.tolist()))
        assert len(passes) == order.directions.size == 2 * num_chunks * num_micro_batches
        assert order.in_flight == 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks + 1


def test_first_passes_of_an_interleaved_rank() -> None:
    """Rank 0 of 2 with 2 chunks: 2 micro-batches through the first chunk, then through the second, and so on."""
    order = order_of("interleaved", 0, 2, 4, 2)
    passes = list(zip(order.directions.tolist(), order.stages.tolist(), order.micro_batches.tolist()))
    forwards = [(stage, number) for direction, stage, number in passes if direction == FORWARD]
    backwards = [(stage, number) for direction, stage, number in passes if direction == BACKWARD]
    assert forwards == [(0, 0), (0, 1), (2, 0), (2, 1), (0, 2), (0, 3), (2, 2), (2, 3)]
    assert backwards == [(2, 0), (2, 1), (0, 0), (0, 1), (2, 2), (2, 3), (0, 2), (0, 3)]
    assert [direction for direction, *_ in passes] == [0] * 4 + [0, 1] * 4 + [1] * 4


def test_messages_of_an_interleaved_rank_in_turns() -> None:
    """Megatron-LM posts four messages at once between a pass backward and the next forward, and none in between."""
    order = order_of("interleaved", 1, 4, 16, 2)
    warm_up = 2 * (4 - 1 - 1) + 4
    forward = warm_up + 6
    assert order.directions[forward - 1 : forward + 2].tolist() == [BACKWARD, FORWARD, BACKWARD]
    before = {"sent": [forward - 2, forward - 1], "received": [forward, forward + 1]}
    moments = [order.send_at[before["sent"]], order.receive_at[before["received"]]]
    assert {int(one) for both in moments for one in both} == {4 * forward - 3}
    everything = np.concatenate([order.send_at, order.receive_at])
    steady = (everything > 4 * warm_up) & (everything < 4 * (order.directions.size - warm_up))
    assert ((everything[steady] + 3) % 8 == 4 * warm_up % 8).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1", 0, 2, 4), "schedule=1f1 is not one of 1f1b, gpipe, interleaved, deepspeed; did you mean 1f1b"),
        (("gpipe", 0, 2, 0), "at least 1 micro-batch a step, not 0; nearest: 1"),
        (("1f1b", 0, 2, 4, 2), "one chunk of layers on a rank, not 2; nearest: interleaved"),
        (("interleaved", 0, 4, 6, 2), "6 micro-batches are not a multiple of the 4 ranks .* nearest: 4 or 8"),
        (("interleaved", 0, 4, 2, 2), "2 micro-batches are not a multiple of the 4 ranks .* nearest: 4$"),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        order_of(*arguments)
