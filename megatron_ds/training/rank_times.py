"""Measurement of what each rank spends its steps with, for the report of slow ranks (`train.stragglers`).

The last steps of each window are measured, on every rank; when the window ends, the ranks gather three numbers each in
host memory.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_ds.config import RunConfig
from megatron_ds.engine import Engine
from megatron_ds.monitor.stragglers import RankTimes, Stragglers
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.communication_time import CommunicationClock
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.training.run_output import RunOutput

MEASURED_STEPS = 10  # of a window


class RankTimesMeter:
    """The meter of a run on one rank; with one rank, or with `train.stragglers.every: 0`, it does nothing.

    Args:
        run: the run file.
        engine: the live engine. Collective over the world.
        output: receives a line for each slow rank, and the report.
    """

    def __init__(self, run: RunConfig, engine: Engine, output: RunOutput) -> None:
        section, world = run.train.stragglers, engine.grid.world
        self._every = section.every if world.size > 1 else 0
        self._host, self._world_size, self._rank = engine.grid.host, world.size, engine.grid.rank
        self._output = output
        self._clock = CommunicationClock(engine.device)
        self._steps, self._wall_s, self._data_s = 0, 0.0, 0.0
        self._pending: Mapping[str, float] = {}
        self._measures = False
        if self._every:
            hosts = gather_objects(socket.gethostname(), self._host.group)
            layout = engine.grid.layout
            stages = layout.peers(*(axis for axis in layout if axis != "pipeline"))
            self._stragglers = Stragglers(hosts, stages, section.threshold, section.windows)

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Measure the block, which does a step, if it is one of the last before that which ends the window."""
        self._measures = self._every > 0 and -step % self._every in range(1, MEASURED_STEPS + 1)
        if not self._measures:
            yield
            return
        began_s = time.perf_counter()
        with self._clock.measuring():
            yield
        self._wall_s += time.perf_counter() - began_s
        self._steps += 1

    def waited_for_data(self, seconds: float) -> None:
        """Add the time for which this step waited for its batch, if it is measured."""
        if self._measures:
            self._data_s += seconds

    def end_window(self, step: int) -> None:
        """Gather the times of all ranks if a window ends with this step. Collective over the world."""
        if not self._ends(step) or not self._steps:
            return
        communication_s = self._clock.take()
        own = (self._wall_s - communication_s - self._data_s, communication_s, self._data_s)
        table = torch.zeros(self._world_size, len(own), dtype=torch.float64)
        table[self._rank] = torch.tensor(own, dtype=torch.float64) / self._steps
        times = [RankTimes(*row) for row in all_reduce_(table, self._host).tolist()]
        self._steps, self._wall_s, self._data_s = 0, 0.0, 0.0
        for line in self._stragglers.add(times):
            self._output.note(line)
        self._pending = self._stragglers.numbers(times)
        self._output.write_stragglers(self._stragglers.report(step))

    def take_numbers(self) -> Mapping[str, float]:
        """Return the numbers of the last window, once, for a line of `metrics.jsonl`."""
        numbers, self._pending = self._pending, {}
        return numbers

    def describe(self) -> str:
        """Return the slow ranks for the run's last line; empty without any."""
        return self._stragglers.report(0).describe() if self._every else ""

    def _ends(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0
