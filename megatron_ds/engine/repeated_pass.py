"""A micro-batch that is computed twice, to find a device that does not repeat its results.

Megatron-LM's rerun state machine repeats a step whose result looks wrong, to tell a fault of the device from one of the
data. Here a forward and a backward pass is repeated from time to time without a suspicion, because most wrong results
look plausible. Nothing of it reaches DeepSpeed: for its duration the module has other parameters, which share the
memory of its own, so that no hook of DeepSpeed's sees their gradients, and each gradient is released once it is summed
up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_ds.engine.base import Engine, MicroBatch
from megatron_ds.engine.replica_checksums import Checksums

PIECE = 2**21  # elements that are summed up at a time
FORWARD = "the forward pass"
"""The name of the forward pass's result among the gradients."""

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Difference of two results, relative to their norm, that additions in another order may give."""


class RepeatedPass:
    """Forward and backward passes of one micro-batch, compared with one another.

    Args:
        engine: an engine below ZeRO-3.
        is_exact: whether the device's operations repeat their bits. If not, norms and sums with random signs are
            compared, within `TOLERANCES`.
    """

    def __init__(self, engine: Engine, *, is_exact: bool) -> None:
        self._engine, self._is_exact = engine, is_exact
        self._checksums = Checksums()
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._drawn: dict[torch.device, Tensor] = {}

    def differing(self, batch: MicroBatch) -> list[str]:
        """Return the names of gradients that differ between two passes, `FORWARD` first if their results do.

        Collective as `Engine.run_alone` is.

        Args:
            batch: this data rank's, in host memory.
        """
        first, second = self._run(batch), self._run(batch)
        assert first.keys() == second.keys(), first.keys() ^ second.keys()
        dtypes = {name: parameter.dtype for name, parameter in self._engine.deepspeed.module.named_parameters()}
        return [name for name in first if not self._equals(first[name], second[name], dtypes.get(name, torch.float32))]

    def _run(self, batch: MicroBatch) -> Mapping[str, list[float] | list[int]]:
        """Return the result and every gradient of a pass, summarised, in the order in which they are computed."""
        found: dict[str, Tensor] = {}

        def add(name: str, values: Tensor) -> None:
            summary = self._summarize(values)
            found[name] = summary if name not in found else 3 * found[name] + summary  # a gradient in several parts

        with self._other_parameters(add):
            add(FORWARD, self._engine.run_alone(batch))
        names = [FORWARD, *(name for name in found if name != FORWARD)]
        return dict(zip(names, torch.stack([found[name] for name in names]).tolist()))

    def _summarize(self, values: Tensor) -> Tensor:
        """Return the checksum, (1,) int64, or the norm and the sum with random signs, (2,) fp64."""
        if self._is_exact:
            return self._checksums.of(values).reshape(1)
        squares, signed = torch.zeros(2, dtype=torch.float64, device=values.device)
        for piece in values.detach().reshape(-1).split(PIECE):  # in fp64 a large embedding's gradient has 10 GB
            wide = piece.double()
            squares, signed = squares + wide.square().sum(), signed + (wide * self._signs(piece)).sum()
        return torch.stack([squares.sqrt(), signed])

    def _signs(self, piece: Tensor) -> Tensor:
        """Return random signs, the same for every piece, (n,) fp64."""
        if piece.device not in self._drawn:
            index = torch.arange(PIECE, device=piece.device)
            self._drawn[piece.device] = (1 - 2 * (index * 2654435761 // 65536 % 2)).double()
        return self._drawn[piece.device][: len(piece)]

    def _equals(self, first: list[float] | list[int], second: list[float] | list[int], dtype: torch.dtype) -> bool:
        if self._is_exact:
            return first == second
        return are_close(first, second, TOLERANCES[dtype])

    @contextmanager
    def _other_parameters(self, add: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Give the module other parameters in the same memory; `add` is called with each gradient of them."""
        handles, replaced = [], []
        for name, own in self._engine.deepspeed.module.named_parameters():
            copy = self._copies.setdefault(own, nn.Parameter(own.detach(), own.requires_grad))
            copy.data = own.data
            if own.requires_grad:
                handles.append(copy.register_post_accumulate_grad_hook(_taking_gradient(name, add)))
        for module in self._engine.deepspeed.module.modules():
            for key, own in module._parameters.items():
                if own is not None:
                    replaced.append((module, key, own))
                    module._parameters[key] = self._copies[own]
        try:
            yield
        finally:
            for module, key, own in replaced:
                module._parameters[key] = own
            for handle in handles:
                handle.remove()


def are_close(first: Sequence[float], second: Sequence[float], tolerance: float) -> bool:
    """Return whether two summaries, a norm and a sum, differ by at most a share of the norm.

    Without finite norms, as where fp16 overflows, there is nothing to compare; the step itself is then skipped.
    """
    if not (math.isfinite(first[0]) and math.isfinite(second[0])):
        return math.isfinite(first[0]) == math.isfinite(second[0])
    limit = tolerance * max(first[0], second[0])
    return all(abs(one - other) <= limit for one, other in zip(first, second))


def _taking_gradient(name: str, add: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        add(name, parameter.grad)
        parameter.grad = None

    return take
