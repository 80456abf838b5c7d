"""Expert parallelism of a layer: the ranks that divide its experts, and the tokens that each of them routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megatron_ds.parallel.collectives import copy_to, gather_rows, split_rows
from megatron_ds.parallel.grid import EXPERT, Axes, Axis
from megatron_ds.parallel.tensor import TensorParallel


def _as_it_is(parameter: Tensor) -> None:
    """Leave a parameter unmarked."""


@dataclass(frozen=True)
class ExpertParallel:
    """The ranks that divide the experts of a layer, and how the tensor ranks divide the tokens between them.

    Each tensor rank routes tokens of its own: its part of the sequence under sequence parallelism, otherwise its part
    of the tokens, which all tensor ranks have.

    Attributes:
        axis: the ranks that divide the experts; size 1 = every rank has all of them.
        tp: tensor and sequence parallelism of the layers around.
        mark: called with every parameter of experts when it is made.
    """

    axis: Axis = field(default_factory=Axis)
    tp: TensorParallel = field(default_factory=TensorParallel)
    mark: Callable[[Tensor], None] = _as_it_is

    @property
    def axes(self) -> Axes:
        """The expert ranks by name, as `layers.param_spec` takes the axes."""
        return {EXPERT: self.axis}

    @property
    def token_axes(self) -> tuple[Axis, ...]:
        """The axes whose ranks route different tokens of one micro-batch."""
        return self.tp.axis, self.tp.context.axis

    @property
    def splits_tokens(self) -> bool:
        """All tensor ranks have all tokens, and divide them for the experts."""
        return self.tp.axis.size > 1 and not self.tp.splits_sequence

    def own_tokens(self, tokens: Tensor) -> Tensor:
        """Return the tokens that this rank routes: (T, H) -> (T', H), where T' may be 0.

        Forward: nothing. Backward: an all-gather of the gradient if tensor ranks divide the tokens.
        """
        return split_rows(tokens, self.tp.axis) if self.splits_tokens else tokens

    def all_tokens(self, own: Tensor, count: int) -> Tensor:
        """Return the results of all tokens: (T', H) -> (T, H).

        Forward: an all-gather if tensor ranks divide the tokens. Backward: nothing.

        Args:
            own: results of `own_tokens`.
            count: T.
        """
        return gather_rows(own, self.tp.axis, count) if self.splits_tokens else own

    def enter(self, parameter: Tensor) -> Tensor:
        """Enter a replicated parameter that is used on this rank's own tokens, as a router is.

        Forward: nothing. Backward: all-reduce of the parameter's size over tensor.
        """
        return copy_to(parameter, self.tp.axis)
