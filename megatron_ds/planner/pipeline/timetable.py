"""Timetables of pipelines by discrete-event simulation: when every pass of a step begins and ends on every rank.

Stages may be uneven, messages take time, and devices may be slow at random with a given variance. Without these, the
timetable agrees with the closed forms of Narayanan et al. 2021: a step of m micro-batches on p ranks takes
(m + p - 1) (F + B) by 1F1B, GPipe and DeepSpeed, and (m + (p - 1) / v) (F + B) by interleaved 1F1B with v chunks, where
F and B are the seconds of a rank's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from megatron_ds.errors import TopologyError
from megatron_ds.planner.pipeline.schedules import BACKWARD, FORWARD, Schedule, check_schedule
from megatron_ds.planner.pipeline.stragglers import Jitter
from megatron_ds.planner.pipeline.tasks import Messages, Tasks, tasks_of

Array = np.ndarray
MOST_NUMBERS = 2**22  # durations that are drawn at a time
PassKind = Literal["forward", "backward"]


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch through a virtual stage.

    Attributes:
        forward_s: of the forward pass.
        backward_s: of the backward pass, recomputation included.
    """

    forward_s: float
    backward_s: float


class Event(NamedTuple):
    """A pass of one rank.

    Attributes:
        rank: from 0.
        kind: of pass.
        micro_batch: from 0.
        chunk: of the rank's layers, from 0.
        start_s, end_s: seconds since the begin of the step.
    """

    rank: int
    kind: PassKind
    micro_batch: int
    chunk: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timetable:
    """One step of a pipeline, from its first pass to its last.

    Attributes:
        schedule: of the pipeline.
        num_ranks, num_micro_batches, num_chunks: p, m and v.
        starts_s, ends_s: (2, p v, m) seconds of passes: forward and backward, by virtual stage and micro-batch.
        duration_s: until the last pass ends, and the last message if messages block.
        busy_s: seconds in passes, by rank.
        message_s: seconds in messages by rank, without waiting for the other side; 0 if they overlap.
        finish_s: end of each rank's last pass.
        in_flight: see `Order.in_flight`, by rank.
        stages, boundaries_s, blocking: what it was made of, see `simulate`.
    """

    schedule: Schedule
    num_ranks: int
    num_micro_batches: int
    num_chunks: int
    starts_s: Array
    ends_s: Array
    duration_s: float
    busy_s: tuple[float, ...]
    message_s: tuple[float, ...]
    finish_s: tuple[float, ...]
    in_flight: tuple[int, ...]
    stages: tuple[StageTimes, ...]
    boundaries_s: tuple[float, ...]
    blocking: bool

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Seconds in which a rank waits, by rank."""
        return tuple(self.duration_s - busy - sent for busy, sent in zip(self.busy_s, self.message_s))

    @property
    def bubble_share(self) -> float:
        """Share of all ranks' seconds in which they wait."""
        return sum(self.bubble_s) / (self.num_ranks * self.duration_s) if self.duration_s else 0.0

    @cached_property
    def events(self) -> list[Event]:
        """All passes, by rank and start."""
        found: list[Event] = []
        kinds: tuple[PassKind, PassKind] = ("forward", "backward")
        for direction, kind in enumerate(kinds):
            for stage in range(self.num_ranks * self.num_chunks):
                chunk, rank = divmod(stage, self.num_ranks)
                times = zip(self.starts_s[direction, stage].tolist(), self.ends_s[direction, stage].tolist())
                found += [Event(rank, kind, number, chunk, start, end) for number, (start, end) in enumerate(times)]
        return sorted(found, key=lambda event: (event.rank, event.start_s, event.end_s))


def simulate(
    stages: Sequence[StageTimes],
    num_micro_batches: int,
    schedule: Schedule = "deepspeed",
    *,
    num_chunks: int = 1,
    message_s: float | Sequence[float] = 0.0,
    blocking: bool | None = None,
    jitter: Jitter | None = None,
) -> Timetable:
    """Return the timetable of a step.

    Args:
        stages: times of the p v virtual stages in the model's order; stage s runs on rank s % p.
        num_micro_batches: in a step.
        schedule: of the passes.
        num_chunks: v.
        message_s: seconds of a message from one virtual stage to the next, and of the gradient back: one number, or one
            for each of the p v - 1 boundaries.
        blocking: messages occupy both ranks and wait for both; False = they overlap with passes. None = blocking in
            DeepSpeed's schedule, which sends and receives synchronously, and overlapped in the others.
        jitter: random slowness; the timetable is that of one replica in one step.

    Raises:
        TopologyError: no such schedule, or it cannot run as many stages or micro-batches.
    """
    tasks, durations_s = _tasks_and_durations(
        stages, num_micro_batches, schedule, num_chunks=num_chunks, message_s=message_s, blocking=blocking
    )
    if jitter is not None:
        random = np.random.default_rng(jitter.seed)
        durations_s = _slow(tasks, durations_s, jitter, random, jitter.slow_devices(random, tasks.num_ranks)[:, :, :1])
        durations_s = durations_s[:, 0]
    ends_s = tasks.ends_s(durations_s)
    shape = (2, tasks.num_stages, num_micro_batches)
    ends, lengths = (values[: tasks.num_passes].reshape(shape) for values in (ends_s, durations_s))
    exchanges = [float(durations_s[posted].max(axis=1).sum()) for posted in tasks.posted]
    return Timetable(
        schedule=schedule,
        num_ranks=tasks.num_ranks,
        num_micro_batches=num_micro_batches,
        num_chunks=num_chunks,
        starts_s=ends - lengths,
        ends_s=ends,
        duration_s=float(ends_s.max()),
        busy_s=_by_rank(lengths.sum(axis=(0, 2)), tasks.num_ranks),
        message_s=tuple(exchanges) or (0.0,) * tasks.num_ranks,
        finish_s=tuple(ends.max(axis=(0, 2)).reshape(num_chunks, -1).max(axis=0).tolist()),
        in_flight=tuple(order.in_flight for order in tasks.orders),
        stages=tuple(stages),
        boundaries_s=tuple(np.broadcast_to(message_s, (len(stages) - 1,)).tolist()),
        blocking=schedule == "deepspeed" if blocking is None else blocking,
    )


def step_times(timetable: Timetable, jitter: Jitter, num_steps: int) -> Array:
    """(num_steps,) seconds of consecutive steps of one run, each of which ends with its slowest replica.

    Args:
        timetable: of a step without random slowness.
        jitter: random slowness.
        num_steps: number of steps.
    """
    tasks, durations_s = _tasks_and_durations(
        timetable.stages,
        timetable.num_micro_batches,
        timetable.schedule,
        num_chunks=timetable.num_chunks,
        message_s=timetable.boundaries_s,
        blocking=timetable.blocking,
    )
    random = np.random.default_rng(jitter.seed)
    of_devices = jitter.slow_devices(random, tasks.num_ranks)
    at_once = max(1, MOST_NUMBERS // durations_s.size)
    found = np.zeros(num_steps)
    for step in range(num_steps):
        for low in range(0, jitter.replicas, at_once):
            slow_s = _slow(tasks, durations_s, jitter, random, of_devices[:, :, low : low + at_once])
            found[step] = max(found[step], tasks.ends_s(slow_s).max())
    return found


def slowdown(timetable: Timetable, jitter: Jitter, num_steps: int = 4) -> float:
    """Return the mean seconds of steps with random slowness, divided by those without."""
    return float(step_times(timetable, jitter, num_steps).mean()) / timetable.duration_s


def _slow(tasks: Tasks, durations_s: Array, jitter: Jitter, random: np.random.Generator, of_devices: Array) -> Array:
    """(tasks + 1, replicas) random seconds of one step."""
    passes_s = durations_s[: tasks.num_passes].reshape(2, tasks.num_stages, -1)
    slow = jitter.slow_passes(random, passes_s, of_devices).reshape(tasks.num_passes, -1)
    return np.concatenate([slow, np.repeat(durations_s[tasks.num_passes :, None], slow.shape[1], axis=1)])


def _tasks_and_durations(
    stages: Sequence[StageTimes],
    num_micro_batches: int,
    schedule: Schedule,
    *,
    num_chunks: int = 1,
    message_s: float | Sequence[float] = 0.0,
    blocking: bool | None = None,
) -> tuple[Tasks, Array]:
    """Return the tasks of a step and their seconds, by number of the task; see `simulate`."""
    if len(stages) % num_chunks or not stages:
        raise TopologyError(f"{len(stages)} virtual stages are not divided by {num_chunks} chunks; nearest: 1 chunk")
    num_ranks = len(stages) // num_chunks
    check_schedule(schedule, num_ranks, num_micro_batches, num_chunks)
    boundaries = np.broadcast_to(np.asarray(message_s, np.float64), (len(stages) - 1,))
    blocks = schedule == "deepspeed" if blocking is None else blocking
    messages: Messages = "blocking" if blocks else "overlapped" if boundaries.any() else "none"
    tasks = tasks_of(schedule, num_ranks, num_micro_batches, num_chunks, messages)
    shape = (2, len(stages), num_micro_batches)
    passes, sent = np.empty(shape), np.zeros(shape)
    passes[FORWARD] = np.array([stage.forward_s for stage in stages])[:, None]
    passes[BACKWARD] = np.array([stage.backward_s for stage in stages])[:, None]
    if num_ranks > 1:
        sent[FORWARD, :-1] = sent[BACKWARD, 1:] = boundaries[:, None]
    return tasks, np.concatenate([passes.ravel(), sent.ravel(), [0.0]])


def _by_rank(of_stages: Array, num_ranks: int) -> tuple[float, ...]:
    return tuple(of_stages.reshape(-1, num_ranks).sum(axis=0).tolist())
