"""A layer computed tile by tile of the sequence, and computed so again in the backward pass (Bekman et al. 2025, ALST).

The layer treats each position alone, so that the tiles' outputs are those of the sequence. What it keeps inside exists
for one tile at a time; between forward and backward pass only its input is kept. The gradients of parameters are added
up over the tiles in fp32 and reach autograd once, as if the layer had run once: hooks on parameters, such as those of
ZeRO, see no tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.products import gradient_sum, keep_gradient_sum, release_gradient_sum
from megatron_ds.parallel.random import RngStates, RngStreams


@dataclass
class _Pass:
    """One forward pass of a layer over the tiles of its input, with all that repeats it.

    Attributes:
        layer: (positions, B, H) -> (positions, B, H).
        graph: its input -> a tensor of the shape and with the gradients of its output.
        tile: positions of a tile; the last one may have fewer.
        rng: the random streams that the layer draws from; None = it draws nothing.
        states: those of the streams at the start of each tile, once it has run.
    """

    layer: Callable[[Tensor], Tensor]
    graph: Callable[[Tensor], Tensor]
    tile: int
    rng: RngStreams | None
    states: list[RngStates] = field(default_factory=list)

    def slices(self, length: int) -> list[slice]:
        return [slice(begin, begin + self.tile) for begin in range(0, length, self.tile)]

    def run(self, x: Tensor) -> Tensor:
        """Return the outputs of all tiles, (S, B, H)."""
        outputs = torch.empty_like(x)
        for part in self.slices(len(x)):
            if self.rng is not None:
                self.states.append(self.rng.states())
            outputs[part] = self.layer(x[part])
        return outputs

    def repeat(self, index: int, x: Tensor) -> Tensor:
        """Return the graph of one tile; its random numbers are those of `run`."""
        streams: AbstractContextManager[None] = nullcontext()
        if self.rng is not None:
            streams = self.rng.returned_to(self.states[index])
        with torch.enable_grad(), streams:
            return self.graph(x)


class _Input(torch.autograd.Function):
    """Save the input of a tiled layer, and compute its gradients; the result has its shape, and no memory.

    It is a node apart from the forward pass, like `products._Operands`: the recomputation of a block, which stops once
    the last saved tensor is restored, then does not run the tiles a second time.
    """

    @staticmethod
    def forward(ctx: Any, tiles: _Pass, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.tiles, ctx.parameters = tiles, parameters  # leaves, whose data ZeRO-3 swaps
        ctx.save_for_backward(x)
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        tiles: _Pass = ctx.tiles
        wants_x, wants = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        wanted = [parameter for parameter, needed in zip(ctx.parameters, wants) if needed]
        grad_x = torch.empty_like(x) if wants_x else None
        with _summing(wanted) as sums:
            for index, part in enumerate(tiles.slices(len(x))):
                tile = x[part].detach().requires_grad_(wants_x)
                output = tiles.repeat(index, tile)
                inputs = [tile, *wanted] if wants_x else wanted
                found = list(torch.autograd.grad(output, inputs, grads[0][part], allow_unused=True))
                if grad_x is not None:
                    grad_x[part] = found.pop(0)
                sums.add(found)
        totals = iter(sums.gradients())
        return None, grad_x, *(next(totals) if needed else None for needed in wants)


class _Output(torch.autograd.Function):
    """Compute a tiled layer, which has the gradients of the `_Input`."""

    @staticmethod
    def forward(ctx: Any, of_input: Tensor, tiles: _Pass, x: Tensor) -> Tensor:
        return tiles.run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _Sums:
    """fp32 sums over tiles of the gradients of parameters.

    Products add to the sums themselves (`products.keep_gradient_sum`). Where an engine has given a parameter a sum of
    its own, they add to that one, and autograd gets nothing.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.own = [parameter for parameter in parameters if gradient_sum(parameter) is None]
        self._totals: dict[int, Tensor] = {
            id(parameter): torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
            for parameter in self.own
        }

    def total(self, parameter: Tensor) -> Tensor:
        return self._totals[id(parameter)]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one tile's gradients, in the order of the parameters; None = it has none, or a product has added it."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if id(parameter) in self._totals:
                self._totals[id(parameter)].add_(gradient)
            else:
                self._totals[id(parameter)] = gradient.float()

    def gradients(self) -> list[Tensor | None]:
        """Return the sums in the dtypes of the parameters, and in their order."""
        totals = [self._totals.get(id(parameter)) for parameter in self.parameters]
        return [
            None if total is None else total.to(parameter.dtype) for parameter, total in zip(self.parameters, totals)
        ]


@contextmanager
def _summing(parameters: Sequence[Tensor]) -> Iterator[_Sums]:
    """Have the backward passes of products within the block add to sums that are made for it."""
    sums = _Sums(parameters)
    for parameter in sums.own:
        keep_gradient_sum(parameter, sums.total(parameter))
    try:
        yield sums
    finally:
        for parameter in sums.own:
            release_gradient_sum(parameter)


def in_tiles(
    layer: Callable[[Tensor], Tensor],
    graph: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    tokens: int,
    rng: RngStreams | None = None,
) -> Tensor:
    """Return `layer(x)`, computed tile by tile, (S, B, H) -> (S, B, H).

    Communication is that of the layer for each tile; the backward pass begins with that of `graph`.

    Args:
        layer: treats every position alone: (positions, B, H) -> the same shape and dtype.
        graph: its input -> a tensor of the shape and with the gradients of its output, whose values are not read: the
            layer itself, or what leaves out its last product.
        x: its input.
        parameters: leaves that the layer reads.
        tokens: of a tile, at least one position.
        rng: the random streams that the layer draws from; None = it draws nothing.
    """
    tiles = _Pass(layer, graph, max(1, tokens // x.shape[1]), rng)
    if not torch.is_grad_enabled():
        return tiles.run(x)
    return _Output.apply(_Input.apply(tiles, x, *parameters), tiles, x.detach())
