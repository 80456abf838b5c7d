"""Random numbers per axis: who draws the same dropout mask, and who must not.

Two streams a rank. *Replicated*: equal on all tensor ranks, for activations that every tensor rank holds whole.
*Sharded*: different on each tensor rank, for activations split over heads or sequence. Both differ between data
replicas and pipeline stages. The replicated stream is torch's default generator; the sharded one is swapped in by
`RngStreams.sharded()`. Each optimizer step begins them anew. The same code serves CPU and accelerators, and
`replayable` makes recomputation draw the same masks again under any checkpoint function that preserves torch's default
generators (torch's and DeepSpeed's do).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_ds.parallel.grid import Grid


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any mix of numbers and names; stable across processes, platforms and versions."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RngStreams:
    """The replicated and the sharded stream of one rank.

    Args:
        seed: the run's seed.
        grid: the rank's stage, its index among the ranks that draw different masks, and its tensor rank.
        device: where activations live; dropout draws from this device's default generator.
    """

    def __init__(self, seed: int, grid: Grid, device: torch.device) -> None:
        self._generator = _default_generator(device)
        self._sharded = torch.Generator(device=device)
        self._place, self._tensor_rank = (seed, grid.pipeline.rank, grid.random.rank), grid.tensor.rank
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Set both streams to where they begin a step, as a function of seed, place and step alone.

        So a run that is resumed at the same layout draws the masks that it would have drawn, and has no states to
        save. In the 0-based `step` the streams go on from one micro-batch to the next.
        """
        sharded = self._sharded.manual_seed(derive_seed("sharded", *self._place, self._tensor_rank, step))
        self._sharded_state: Tensor = sharded.get_state()
        self._generator.manual_seed(derive_seed("replicated", *self._place, step))

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Within the block, torch's default generator is the sharded stream."""
        replicated_state = self._generator.get_state()
        self._generator.set_state(self._sharded_state)
        try:
            yield
        finally:
            self._sharded_state = self._generator.get_state()
            self._generator.set_state(replicated_state)

    def replayable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, made to see the sharded stream of its first call at every later call, leaving no trace of those.

        The replicated stream is left to the checkpoint function around it.
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
