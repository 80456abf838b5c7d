"""Passes and messages of a pipeline's step as tasks, each of which waits for others.

Tasks and what they wait for depend on the schedule and the number of ranks, micro-batches and chunks, and not on
times. So they are derived once, sorted so that each level waits for lower ones only, and then a step's times are one
sweep over the levels, at once for many draws of the durations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_ds.planner.pipeline.schedules import BACKWARD, FORWARD, Order, Schedule, order_of

Array = np.ndarray
Messages = Literal["none", "overlapped", "blocking"]


@dataclass(frozen=True)
class Tasks:
    """All tasks of a step.

    The pass in direction d of stage s and micro-batch i has the number (d S + s) m + i, for S virtual stages and m
    micro-batches. The message with its result has this number + 2 S m. The number 4 S m stands for no task; it ends at
    0.

    Attributes:
        num_ranks, num_stages, num_micro_batches: sizes p, S, m.
        orders: of the ranks.
        posted: messages that block and that each rank posts at once, (exchanges, most in one), padded by the number of
            no task; by rank, empty if messages do not block.
        before: (tasks, W) the tasks that each waits for, padded by the number of no task; tasks sorted by level.
        sorted_numbers: (tasks,) the number of each row of `before`.
        levels: the first row of each level, and the number of rows.
    """

    num_ranks: int
    num_stages: int
    num_micro_batches: int
    orders: tuple[Order, ...]
    posted: tuple[Array, ...]
    before: Array
    sorted_numbers: Array
    levels: Array

    @property
    def num_passes(self) -> int:
        """2 S m."""
        return 2 * self.num_stages * self.num_micro_batches

    def ends_s(self, durations_s: Array) -> Array:
        """Return when every task ends.

        Args:
            durations_s: (4 S m + 1, ...), by number of the task; any further dims are draws.

        Returns:
            Seconds of the same shape since the first task began.
        """
        ends = np.zeros_like(durations_s)
        numbers, before = self.sorted_numbers, self.before
        columns = range(1, before.shape[1])
        edges = self.levels.tolist()
        for low, high in pairwise(edges):
            waits = before[low:high]
            begins = ends[waits[:, 0]]
            for column in columns:
                np.maximum(begins, ends[waits[:, column]], out=begins)
            these = numbers[low:high]
            ends[these] = begins + durations_s[these]
        return ends


@lru_cache(maxsize=16)
def tasks_of(schedule: Schedule, num_ranks: int, num_micro_batches: int, num_chunks: int, messages: Messages) -> Tasks:
    """Return the tasks of a step.

    Args:
        schedule, num_ranks, num_micro_batches, num_chunks: see `order_of`.
        messages: "none" take no time. "overlapped" ones occupy a link in one direction from the end of the pass that
            yields them, in the order of these passes, and no rank. "blocking" ones begin when both ranks have posted
            them and occupy both.

    Raises:
        TopologyError: see `order_of`.
    """
    orders = tuple(order_of(schedule, rank, num_ranks, num_micro_batches, num_chunks) for rank in range(num_ranks))
    num_stages = num_ranks * num_chunks
    if num_ranks == 1:
        messages = "none"  # results stay on the rank
    waits = _Waits(num_stages, num_micro_batches, orders)
    before = waits.blocking() if messages == "blocking" else waits.overlapped(messages == "none")
    posted = tuple(waits.posted()) if messages == "blocking" else ()
    numbers, levels = _sort(before)
    return Tasks(num_ranks, num_stages, num_micro_batches, orders, posted, before[numbers], numbers, levels)


class _Waits:
    """Tasks that the tasks of a step wait for."""

    def __init__(self, num_stages: int, num_micro_batches: int, orders: tuple[Order, ...]) -> None:
        self.num_stages, self.num_micro_batches, self.orders = num_stages, num_micro_batches, orders
        self.num_passes = 2 * num_stages * num_micro_batches
        self.nothing = 2 * self.num_passes
        self.passes = [self._numbers(order.directions, order.stages, order.micro_batches) for order in orders]

    @cached_property
    def groups(self) -> list[Array]:
        """Tasks of a rank that run at once, (groups, most in one), in the rank's order, by rank."""
        return [self._groups(order, passes) for order, passes in zip(self.orders, self.passes)]

    def posted(self) -> Iterator[Array]:
        """Yield the messages that each rank posts at once, (exchanges, most in one)."""
        for members in self.groups:
            yield members[members[:, 0] >= self.num_passes]

    def _numbers(self, directions: Array, stages: Array, micro_batches: Array) -> Array:
        return (directions * self.num_stages + stages) * self.num_micro_batches + micro_batches

    def _received(self, order: Order) -> Array:
        """Return the number of the message that each pass of a rank needs, or that of no task."""
        forward = order.directions == FORWARD
        of = order.stages + np.where(forward, -1, 1)
        numbers = self._numbers(order.directions, of, order.micro_batches) + self.num_passes
        return np.where((of < 0) | (of >= self.num_stages), self.nothing, numbers)

    def _sent(self, order: Order) -> Array:
        """Return the number of the message that each pass of a rank yields, or that of no task."""
        last = np.where(order.directions == FORWARD, order.stages == self.num_stages - 1, order.stages == 0)
        numbers = self._numbers(order.directions, order.stages, order.micro_batches) + self.num_passes
        return np.where(last, self.nothing, numbers)

    def overlapped(self, free: bool) -> Array:
        """(tasks + 1, 2): what each task waits for if messages occupy links, or nothing if they are free."""
        before = np.full((self.nothing + 1, 2), self.nothing, np.int32)
        for order, passes in zip(self.orders, self.passes):
            received, sent = self._received(order), self._sent(order)
            before[passes[1:], 0] = passes[:-1]
            before[passes, 1] = np.where(received < self.nothing, received - free * self.num_passes, self.nothing)
            if free:
                continue
            for direction in (FORWARD, BACKWARD):
                here = (order.directions == direction) & (sent < self.nothing)
                before[sent[here], 0] = passes[here]
                before[sent[here][1:], 1] = sent[here][:-1]
        return before

    def blocking(self) -> Array:
        """(tasks + 1, W): what each task waits for if messages occupy both ranks."""
        width = max(members.shape[1] for members in self.groups)
        before = np.full((self.nothing + 1, 2 * width), self.nothing, np.int32)
        ranks_done = np.zeros(self.nothing + 1, np.int32)
        for members in self.groups:
            earlier = np.vstack([np.full((1, members.shape[1]), self.nothing), members[:-1]])
            for column in members.T:
                there = column < self.nothing
                at = column[there]
                for slot in range(members.shape[1]):
                    before[at, ranks_done[at] * width + slot] = earlier[there, slot]
                ranks_done[at] += 1
        return before

    def _groups(self, order: Order, passes: Array) -> Array:
        moments = np.concatenate([4 * np.arange(passes.size), order.receive_at, order.send_at])
        numbers = np.concatenate([passes, self._received(order), self._sent(order)])
        there = numbers < self.nothing
        moments, numbers = moments[there], numbers[there]
        by_moment = np.argsort(moments, kind="stable")
        moments, numbers = moments[by_moment], numbers[by_moment]
        distinct, firsts, group = np.unique(moments, return_index=True, return_inverse=True)
        slots = np.arange(numbers.size) - firsts[group]
        members = np.full((distinct.size, int(slots.max()) + 1), self.nothing)
        members[group, slots] = numbers
        return members


def _sort(before: Array) -> tuple[Array, Array]:
    """Sort tasks so that each waits only for tasks of lower levels. Return their numbers and the levels' edges."""
    nothing = before.shape[0] - 1
    after = _after(before)
    open_waits = (before < nothing).sum(axis=1)
    open_waits[nothing] = -1
    places = np.empty_like(open_waits)
    level = np.flatnonzero(open_waits == 0)
    found, edges, num = [level], [0, level.size], level.size
    while num < nothing:
        later = after[level].ravel()
        np.subtract.at(open_waits, later, 1)
        level = later[open_waits[later] == 0]
        numbers = np.arange(level.size)
        places[level] = numbers
        level = level[places[level] == numbers]  # once each
        assert level.size, f"{nothing - num} of {nothing} tasks wait for each other"
        found.append(level)
        num += level.size
        edges.append(num)
    return np.concatenate(found), np.array(edges)


def _after(before: Array) -> Array:
    """(tasks, most of one): the tasks that wait for each, padded."""
    nothing = before.shape[0] - 1
    causes = before[:nothing].ravel()
    entries = np.flatnonzero(causes < nothing)
    entries = entries[np.argsort(causes[entries], kind="stable")]
    causes, effects = causes[entries], entries // before.shape[1]
    counts = np.bincount(causes, minlength=nothing)
    begins = np.cumsum(counts) - counts
    after = np.full((nothing, max(1, int(counts.max(initial=0)))), nothing)
    after[causes, np.arange(causes.size) - begins[causes]] = effects
    return after
