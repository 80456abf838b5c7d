"""Timetables of pipelines, against closed forms and against a slow simulation that is written another way."""

import time
from itertools import pairwise

import numpy as np
import pytest

from megatron_ds.errors import TopologyError
from megatron_ds.planner.pipeline.schedules import FORWARD, order_of
from megatron_ds.planner.pipeline.timetable import StageTimes, Timetable, simulate

FORWARD_S, BACKWARD_S = 1.0, 2.25


def even(num_ranks: int, num_chunks: int = 1) -> list[StageTimes]:
    return [StageTimes(FORWARD_S / num_chunks, BACKWARD_S / num_chunks)] * (num_ranks * num_chunks)


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(1, 1), (1, 4), (2, 2), (4, 4), (4, 19), (8, 64), (6, 3)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "deepspeed"])
def test_bubble_by_closed_form(schedule: str, num_ranks: int, num_micro_batches: int) -> None:
    found = simulate(even(num_ranks), num_micro_batches, schedule)
    both = FORWARD_S + BACKWARD_S
    assert found.duration_s == pytest.approx((num_micro_batches + num_ranks - 1) * both)
    assert found.busy_s == pytest.approx([num_micro_batches * both] * num_ranks)
    ideal = num_micro_batches * both
    assert np.array(found.bubble_s) / ideal == pytest.approx((num_ranks - 1) / num_micro_batches)


@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches", "num_chunks"),
    [(2, 2, 2), (2, 4, 2), (4, 16, 2), (4, 8, 5), (8, 64, 3), (1, 3, 2)],
)
def test_interleaved_bubble_by_closed_form(num_ranks: int, num_micro_batches: int, num_chunks: int) -> None:
    found = simulate(even(num_ranks, num_chunks), num_micro_batches, "interleaved", num_chunks=num_chunks)
    both = FORWARD_S + BACKWARD_S
    assert found.duration_s == pytest.approx((num_micro_batches + (num_ranks - 1) / num_chunks) * both)
    bubble = (num_ranks - 1) / (num_chunks * num_micro_batches)
    assert np.array(found.bubble_s) / (num_micro_batches * both) == pytest.approx(bubble)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "deepspeed"])
def test_a_slow_last_stage_sets_the_pace(schedule: str) -> None:
    """It waits only for the first micro-batch to come and, after it is done, for the last gradient to reach rank 0."""
    both = FORWARD_S + BACKWARD_S
    found = simulate([*even(4)[:-1], StageTimes(2 * FORWARD_S, 2 * BACKWARD_S)], 12, schedule)
    assert found.duration_s == pytest.approx((2 * 12 + 3) * both)
    assert found.bubble_s == pytest.approx([found.duration_s - 12 * both] * 3 + [3 * both])


def test_first_and_last_message_of_a_step_are_never_hidden() -> None:
    message_s = 0.125
    found = simulate(even(4), 1, "1f1b", message_s=message_s)
    assert found.duration_s == pytest.approx(4 * (FORWARD_S + BACKWARD_S) + 6 * message_s)
    blocking = simulate(even(4), 1, "deepspeed", message_s=message_s)
    assert blocking.duration_s == found.duration_s
    assert blocking.message_s == pytest.approx([2 * message_s, 4 * message_s, 4 * message_s, 2 * message_s])
    assert found.message_s == (0, 0, 0, 0)


def test_gpipe_hides_messages_and_a_slow_link_sets_the_pace() -> None:
    num_micro_batches = 10
    quick = simulate(even(2), num_micro_batches, "gpipe", message_s=0.5)
    assert quick.duration_s == pytest.approx(11 * (FORWARD_S + BACKWARD_S) + 2 * 0.5)
    slow = simulate([StageTimes(1.0, 2.0)] * 2, num_micro_batches, "gpipe", message_s=3.0)
    # The last of ten activations arrives after 1 + 30 s, then passes forward and backward; the gradients take as long.
    assert slow.duration_s == pytest.approx(1 + 30 + 1 + 2 + 30 + 2)


def slowly(
    stages: list[StageTimes],
    num_micro_batches: int,
    schedule: str,
    num_chunks: int,
    messages: list[float],
    blocking: bool,
) -> np.ndarray:
    """Ends of passes by a loop over ranks that each run their program as far as they can, with clocks of their own."""
    num_ranks = len(stages) // num_chunks
    programs = []
    for rank in range(num_ranks):
        order = order_of(schedule, rank, num_ranks, num_micro_batches, num_chunks)
        steps: dict[int, list[tuple]] = {}
        for at, (direction, stage, number) in enumerate(
            zip(order.directions.tolist(), order.stages.tolist(), order.micro_batches.tolist())
        ):
            source = stage - 1 if direction == FORWARD else stage + 1
            target = stage + 1 if direction == FORWARD else stage - 1
            if 0 <= source < len(stages):
                moment = int(order.receive_at[at]) if blocking else 4 * at - 1
                steps.setdefault(moment, []).append((direction, source, number))
            steps.setdefault(4 * at, []).append(("pass", direction, stage, number))
            if 0 <= target < len(stages):
                moment = int(order.send_at[at]) if blocking else 4 * at + 1
                steps.setdefault(moment, []).append((direction, stage, number))
        programs.append([steps[moment] for moment in sorted(steps)])
    clocks, places = [0.0] * num_ranks, [0] * num_ranks
    ends = np.zeros((2, len(stages), num_micro_batches))
    posted: dict[tuple, list[tuple[int, float]]] = {}  # by message: ranks and when they posted it
    arrived: dict[tuple, float] = {}
    links: dict[tuple[int, int], float] = {}  # by rank and direction: free from
    posting: list[bool] = [False] * num_ranks
    while any(place < len(program) for place, program in zip(places, programs)):
        before = (list(places), len(arrived), list(posting))
        for rank, program in enumerate(programs):
            if places[rank] == len(program):
                continue
            step = program[places[rank]]
            if step[0][0] == "pass":
                _, direction, stage, number = step[0]
                clocks[rank] += stages[stage].forward_s if direction == FORWARD else stages[stage].backward_s
                ends[direction, stage, number] = clocks[rank]
                places[rank] += 1
                continue
            if not posting[rank]:
                posting[rank] = True
                for message in step:
                    direction, stage, _ = message
                    seconds = messages[stage if direction == FORWARD else stage - 1]
                    if blocking:
                        posted.setdefault(message, []).append((rank, clocks[rank]))
                        if len(posted[message]) == 2:
                            arrived[message] = max(when for _, when in posted[message]) + seconds
                    elif stage % num_ranks == rank:
                        begin = max(ends[message], links.get((rank, direction), 0.0))
                        arrived[message] = links[rank, direction] = begin + seconds
            waited = [one for one in step if blocking or one[1] % num_ranks != rank]
            if all(one in arrived for one in waited):
                clocks[rank] = max([clocks[rank]] + [arrived[one] for one in waited])
                places[rank] += 1
                posting[rank] = False
        assert before != (list(places), len(arrived), list(posting)), "the ranks wait for each other"
    return ends


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    ("schedule", "num_ranks", "num_micro_batches", "num_chunks"),
    [("1f1b", 4, 9, 1), ("gpipe", 3, 5, 1), ("deepspeed", 5, 11, 1), ("deepspeed", 4, 2, 1), ("interleaved", 3, 9, 3)],
)
def test_uneven_stages_and_messages(
    schedule: str, num_ranks: int, num_micro_batches: int, num_chunks: int, blocking: bool
) -> None:
    random = np.random.default_rng(7)
    for _ in range(5):
        stages = [StageTimes(*random.uniform(0.2, 2.0, 2)) for _ in range(num_ranks * num_chunks)]
        messages = random.uniform(0.0, 0.7, num_ranks * num_chunks - 1).tolist()
        found = simulate(
            stages, num_micro_batches, schedule, num_chunks=num_chunks, message_s=messages, blocking=blocking
        )
        expected = slowly(stages, num_micro_batches, schedule, num_chunks, messages, blocking)
        np.testing.assert_allclose(found.ends_s, expected, rtol=1e-12)


def test_events_are_a_legal_timetable() -> None:
    found = simulate(even(4, 2), 8, "interleaved", num_chunks=2, message_s=0.05)
    assert len(found.events) == 2 * 8 * 8
    for rank in range(4):
        mine = [event for event in found.events if event.rank == rank]
        assert all(one.end_s <= other.start_s + 1e-12 for one, other in pairwise(mine))
        assert mine[-1].end_s == found.finish_s[rank]
    ends = {(event.kind, event.chunk * 4 + event.rank, event.micro_batch): event for event in found.events}
    for (kind, stage, number), event in ends.items():
        source = (kind, stage - 1 if kind == "forward" else stage + 1, number)
        if source in ends:
            assert event.start_s >= ends[source].end_s + 0.05 - 1e-12
    assert isinstance(found, Timetable) and found.bubble_share == pytest.approx(
        sum(found.bubble_s) / 4 / found.duration_s
    )


def test_bubble_series_of_bigscience() -> None:
    """The 182B of BigScience (TP 4, PP 12, micro-batches 32 to 128): one time of a micro-batch explains all steps.

    Source: bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md. The least squares of the four
    steps have a slope of 0.743 s a micro-batch; the pipeline then explains 8.2 s of the intercept of 12.0 s, and 3.8 s
    are left for the reduction, the optimizer and the rest.
    """
    measured = {32: 35.77, 64: 59.65, 96: 83.11, 128: 107.12}
    of_micro_batch, intercept = np.polyfit(list(measured), list(measured.values()), 1)
    stages = [StageTimes(of_micro_batch / 4, of_micro_batch * 3 / 4)] * 12  # recomputed: backward = 3 forward
    steps = {number: simulate(stages, number, "deepspeed").duration_s for number in measured}
    assert of_micro_batch == pytest.approx(0.743, abs=0.001) and intercept == pytest.approx(12.0, abs=0.05)
    assert intercept - 11 * of_micro_batch == pytest.approx(3.8, abs=0.1)
    for number, seconds in measured.items():
        assert steps[number] + 3.85 == pytest.approx(seconds, rel=0.004)  # the measured steps are that far from a line


def test_large_pipelines_are_simulated_within_a_second() -> None:
    begin = time.process_time()
    found = simulate(even(64, 8), 512, "interleaved", num_chunks=8)
    assert time.process_time() - begin < 4  # about 0.7 s where nothing else runs
    assert found.duration_s == pytest.approx((512 + 63 / 8) * (FORWARD_S + BACKWARD_S))


def test_refusals() -> None:
    with pytest.raises(TopologyError, match="3 virtual stages are not divided by 2 chunks"):
        simulate(even(3), 6, "interleaved", num_chunks=2)
