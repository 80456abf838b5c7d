"""Activations that cross the boundary between two pipeline stages: from names to an ordered tuple, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ds.models.sequential import Activations, LayerSpec


class Boundary:
    """Entry into a pipeline stage.

    All hidden states are sent as one tensor, concatenated along the sequence. So one gradient returns, and the sending
    stage runs backward once: DeepSpeed runs a backward pass for each tensor that it receives a gradient of, and the
    second pass would repeat the layers that both depend on (an encoder, below the decoder that reads it).

    Args:
        spec: the first layer after the boundary.
        divisor: number of ranks over which hidden states are divided along the sequence.
    """

    def __init__(self, spec: LayerSpec, divisor: int) -> None:
        self._spec, self._divisor = spec, divisor

    def pack(self, activations: Activations, shapes: Mapping[str, Sequence[int]]) -> tuple[Tensor, ...]:
        """Pack activations by name into a tuple: hidden states (all positions, B, H), then the columns of the batch.

        Args:
            activations: the output of the layer before the boundary.
            shapes: shapes of the batch's columns, (B, ...).
        """
        states = [activations[name] for name in self._spec.hidden]
        lengths = self._lengths(shapes)
        assert [len(state) for state in states] == lengths, ([tuple(state.shape) for state in states], lengths)
        columns = [activations[name] for name in self._columns(shapes)]
        return (torch.cat(states) if len(states) > 1 else states[0], *columns) if states else tuple(columns)

    def unpack(self, tensors: tuple[Tensor, ...], shapes: Mapping[str, Sequence[int]]) -> Activations:
        """Invert `pack`."""
        activations: Activations = {}
        columns = list(tensors)
        if self._spec.hidden:
            states = columns.pop(0)
            activations.update(zip(self._spec.hidden, states.split(self._lengths(shapes))))
        names = self._columns(shapes)
        assert len(names) == len(columns), (names, [tuple(column.shape) for column in columns])
        return {**activations, **dict(zip(names, columns))}

    def _lengths(self, shapes: Mapping[str, Sequence[int]]) -> list[int]:
        return [shapes[column][1] // self._divisor for column in self._spec.hidden.values()]

    def _columns(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        return [name for name in self._spec.columns if name in shapes]
