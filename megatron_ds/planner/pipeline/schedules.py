"""Orders in which pipeline schedules compute: 1F1B, GPipe, interleaved 1F1B, and DeepSpeed's.

A model of p * v virtual stages runs on p ranks, stage s on rank s % p as its chunk s // p. An order says which passes a
rank runs one after another, and where between them it sends and receives. It holds no times: `timetable` adds them.

GPipe is of Huang et al. 2019, 1F1B of Narayanan et al. 2019 (PipeDream-Flush in Narayanan et al. 2021), and interleaved
1F1B of Narayanan et al. 2021. DeepSpeed's `TrainSchedule` computes in the order of 1F1B, and sends a result only at the
begin of its next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megatron_ds.errors import TopologyError, not_one_of

Array = np.ndarray
Schedule = Literal["1f1b", "gpipe", "interleaved", "deepspeed"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
FORWARD, BACKWARD = 0, 1


@dataclass(frozen=True)
class Order:
    """The N passes of one rank, one after another, each array of shape (N,).

    Attributes:
        directions: `FORWARD` or `BACKWARD`.
        stages: virtual stages.
        micro_batches: from 0.
        receive_at, send_at: moments of the message that a pass needs and of the message with its result. Pass n runs at
            4 n. Messages of one moment are posted at once, and the rank waits for all of them.
    """

    directions: Array
    stages: Array
    micro_batches: Array
    receive_at: Array
    send_at: Array

    @property
    def in_flight(self) -> int:
        """Most passes of micro-batches through chunks that have gone forward and not yet back."""
        return int(np.cumsum(1 - 2 * self.directions).max())


def order_of(schedule: Schedule, rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Order:
    """Return the passes of a rank.

    Raises:
        TopologyError: no such schedule, or it cannot run as many micro-batches or chunks.
    """
    check_schedule(schedule, num_ranks, num_micro_batches, num_chunks)
    if schedule == "interleaved":
        return _interleaved(rank, num_ranks, num_micro_batches, num_chunks)
    numbers = np.arange(num_micro_batches)
    ranks = np.full_like(numbers, rank)
    if schedule == "gpipe":
        return _batched(*_alternate(ranks, ranks, numbers, numbers, num_micro_batches))
    warm_up = min(num_ranks - rank - 1, num_micro_batches)
    passes = _alternate(ranks, ranks, numbers, numbers, warm_up)
    return _one_by_one(*passes, pauses=warm_up == num_micro_batches) if schedule == "deepspeed" else _batched(*passes)


def check_schedule(schedule: str, num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> None:
    """Raise TopologyError unless a pipeline can run this schedule."""
    if schedule not in SCHEDULES:
        raise TopologyError(f"schedule={schedule} {not_one_of(schedule, SCHEDULES)}")
    if num_micro_batches < 1:
        raise TopologyError(f"a pipeline runs at least 1 micro-batch a step, not {num_micro_batches}; nearest: 1")
    if schedule != "interleaved" and num_chunks != 1:
        raise TopologyError(
            f"schedule={schedule} runs one chunk of layers on a rank, not {num_chunks}; nearest: interleaved"
        )
    if schedule == "interleaved" and num_micro_batches % num_ranks:
        low = num_micro_batches // num_ranks * num_ranks
        near = " or ".join(str(number) for number in (low, low + num_ranks) if number)
        raise TopologyError(
            f"{num_micro_batches} micro-batches are not a multiple of the {num_ranks} ranks of an interleaved "
            f"pipeline; nearest: {near}"
        )


def num_buffers(rank: int, num_ranks: int, num_micro_batches: int) -> int:
    """Return the pipeline buffers that DeepSpeed's `TrainSchedule` has on a rank: one more than needed on the last."""
    return max(2, min(num_ranks - rank, num_micro_batches))


def _alternate(
    forward_stages: Array, backward_stages: Array, forwards: Array, backwards: Array, warm_up: int
) -> tuple[Array, Array, Array]:
    """Return directions, stages and micro-batches: `warm_up` passes forward, then in turns, then the rest backward."""
    num = len(forwards)
    steady = np.arange(num - warm_up)
    places = np.concatenate([np.arange(warm_up), warm_up + 2 * steady])  # of passes forward
    back = np.concatenate([warm_up + 1 + 2 * steady, num + steady.size + np.arange(warm_up)])
    directions = np.empty(2 * num, np.int64)
    stages, micro_batches = np.empty_like(directions), np.empty_like(directions)
    for direction, at, of_stage, numbers in (
        (FORWARD, places, forward_stages, forwards),
        (BACKWARD, back, backward_stages, backwards),
    ):
        directions[at], stages[at], micro_batches[at] = direction, of_stage, numbers
    return directions, stages, micro_batches


def _batched(directions: Array, stages: Array, micro_batches: Array) -> Order:
    """Order in which the messages between two passes are posted at once, as Megatron-LM does."""
    at = 4 * np.arange(directions.size)
    return Order(directions, stages, micro_batches, receive_at=at - 3, send_at=at + 1)


def _one_by_one(directions: Array, stages: Array, micro_batches: Array, pauses: bool) -> Order:
    """Order of DeepSpeed, which sends and receives one after another.

    Between a pass forward and one backward it receives first, unless it has steps without a pass between them
    (`pauses`: there are too few micro-batches to fill the pipeline). Otherwise it sends first.
    """
    at = 4 * np.arange(directions.size)
    turns = np.append((directions[:-1] == FORWARD) & (directions[1:] == BACKWARD) & (not pauses), False)
    receive_at = at - np.where(np.roll(turns, 1), 3, 2)
    return Order(directions, stages, micro_batches, receive_at=receive_at, send_at=at + np.where(turns, 2, 1))


def _interleaved(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int) -> Order:
    """Order of interleaved 1F1B; in turns, the messages of a pass forward and one backward are posted at once."""
    numbers = np.arange(num_micro_batches * num_chunks)
    chunks = numbers // num_ranks % num_chunks
    micro_batches = numbers // (num_ranks * num_chunks) * num_ranks + numbers % num_ranks
    warm_up = min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks, numbers.size)
    stages, reversed_stages = chunks * num_ranks + rank, (num_chunks - 1 - chunks) * num_ranks + rank
    passes = _alternate(stages, reversed_stages, micro_batches, micro_batches, warm_up)
    order = _batched(*passes)
    pairs = warm_up + 2 * np.arange(numbers.size - warm_up)  # places of the passes forward that are in turns
    order.send_at[pairs] += 4
    order.receive_at[pairs + 1] -= 4
    return order
