"""Random streams per axis: ranks that must draw the same dropout mask, and ranks that must draw different ones.

Each rank has two streams. *Replicated*: equal on all tensor ranks, for activations that every tensor rank holds in
full. *Sharded*: different on each tensor rank, for activations split over heads or sequence. Both differ between the
ranks of the grid's `random` role and between pipeline stages. The replicated stream is torch's default generator; the
sharded one is swapped in by `RngStreams.sharded()`. Each optimizer step seeds them again. The same code serves CPU and
accelerators, and `replayable` makes recomputation draw the same masks again under any checkpoint function that
preserves torch's default generators (torch's and DeepSpeed's do).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_ds.parallel.grid import Grid

RngStates = tuple[Tensor, Tensor]
"""States of the replicated and the sharded stream."""


def derive_seed(*parts: object) -> int:
    """Derive a 63-bit seed from numbers and names; it is the same in all processes, platforms and versions."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RngStreams:
    """The replicated and the sharded stream of one rank.

    Args:
        seed: the run's seed.
        grid: the grid, whose pipeline, `random` and tensor ranks enter the seeds.
        device: the device of the activations; dropout draws from its default generator.
    """

    def __init__(self, seed: int, grid: Grid, device: torch.device) -> None:
        self._generator = _default_generator(device)
        self._sharded = torch.Generator(device=device)
        self._place, self._tensor_rank = (seed, grid.pipeline.rank, grid.random.rank), grid.tensor.rank
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Seed both streams for the 0-based `step`, as a function of seed, coordinates and step alone.

        So a run that is resumed at the same layout draws the masks that it would have drawn, and has no states to
        save. Within the step the streams continue from one micro-batch to the next.
        """
        sharded = self._sharded.manual_seed(derive_seed("sharded", *self._place, self._tensor_rank, step))
        self._sharded_state: Tensor = sharded.get_state()
        self._generator.manual_seed(derive_seed("replicated", *self._place, step))

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Make torch's default generator the sharded stream within the block."""
        replicated_state = self._generator.get_state()
        self._generator.set_state(self._sharded_state)
        try:
            yield
        finally:
            self._sharded_state = self._generator.get_state()
            self._generator.set_state(replicated_state)

    def states(self) -> RngStates:
        """Return the states of both streams."""
        return self._generator.get_state(), self._sharded_state

    @contextmanager
    def returned_to(self, states: RngStates) -> Iterator[None]:
        """Have both streams start from earlier states within the block; after it they are where they were before."""
        now = self.states()
        self._set(states)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, states: RngStates) -> None:
        replicated, self._sharded_state = states
        self._generator.set_state(replicated)

    def replayable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `fn` so that every later call starts from the sharded stream of its first call and does not advance it.

        The checkpoint function around it preserves the replicated stream.
        """
        state_at_first_call: Tensor | None = None

        def run(*args: Any) -> Any:
            nonlocal state_at_first_call
            if state_at_first_call is None:
                state_at_first_call = self._sharded_state
                return fn(*args)
            now, self._sharded_state = self._sharded_state, state_at_first_call
            try:
                return fn(*args)
            finally:
                self._sharded_state = now

        return run


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    backend = torch.get_device_module(device)
    backend.init()
    return backend.default_generators[device.index if device.index is not None else backend.current_device()]
