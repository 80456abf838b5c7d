"""Low-rank adapters of parallel linear layers (Hu et al. 2021, LoRA): y = W x + s B A x, with W frozen.

The r-wide product A x is where an adapter crosses into or out of the tensor-parallel region, so that it moves S B r
elements where its layer moves S B H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.parameter import ParamSpec, make_parameter
from megatron_ds.parallel.collectives import copy_to, gather_sequence
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class LowRank:
    """What an adapter is, whatever it adapts.

    Attributes:
        rank: r.
        scale: s.
        dropout: on what A takes.
        a_bound, a_std: A begins uniform within ±bound, or normal; neither = 0.
        b_bound: B begins uniform within ±bound; 0 = at 0, so that at first nothing is changed.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    a_bound: float | None = None
    a_std: float | None = None
    b_bound: float | None = None


@dataclass(frozen=True)
class Output:
    """One of the projections that share an adapter's A.

    Attributes:
        size: output features, whole.
        units: how many things that cannot be cut they are made of (key and value heads); None = any cut will do.
    """

    size: int
    units: int | None = None


class ColumnAdapter(nn.Module):
    """s B A x beside a column-parallel layer: (S, B, H), or (S/t, B, H) under sequence parallelism -> (S, B, out/t).

    Forward nothing, or an all-gather of the r-wide product; backward its all-reduce or reduce-scatter. Shares that
    neighbours hold alike get the sum of their gradients.

    Args:
        in_features: H.
        outputs: name -> a projection of x; those that are one matrix in Hugging Face's words have one A.
        low: rank, scale and the rest.
        tp: the tensor axis.
        rng: streams of the dropout.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str, Output],
        low: LowRank,
        tp: TensorParallel,
        rng: RngStreams | None,
    ) -> None:
        super().__init__()
        self.low, self.tp = low, tp
        self.a = make_parameter(ParamSpec((low.rank, in_features), std=low.a_std, bound=low.a_bound), tp.axis)
        self.shares = {}
        for name, output in outputs.items():
            spec = ParamSpec((output.size, low.rank), 0, bound=low.b_bound, units=output.units)
            self.register_parameter(f"b_{name}", make_parameter(spec, tp.axis))  # its own: ZeRO-3 gathers no child's
            self.shares[name] = spec.shares(tp.axis.size)
        self.dropout = HiddenDropout(low.dropout, rng, differs=tp.splits_sequence)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """By name of the projection."""
        narrow = F.linear(self.dropout(x), self.tp.between(self.a))
        axis = self.tp.axis
        narrow = gather_sequence(narrow, axis) if self.tp.splits_sequence else copy_to(narrow, axis)
        return {
            name: F.linear(narrow, self.tp.shared(self.get_parameter(f"b_{name}"), shares)) * self.low.scale
            for name, shares in self.shares.items()
        }


class RowAdapter(nn.Module):
    """s B A x beside a row-parallel layer: (S, B, in/t) -> (S, B, H), or (S/t, B, H) under sequence parallelism.

    Forward an all-reduce or reduce-scatter of the r-wide product; backward nothing or an all-gather.

    Args:
        in_features, out_features: whole sizes.
        low: rank, scale and the rest.
        tp: the tensor axis.
        rng: streams of the dropout, whose masks differ between tensor ranks: they hold different features.
    """

    def __init__(
        self, in_features: int, out_features: int, low: LowRank, tp: TensorParallel, rng: RngStreams | None
    ) -> None:
        super().__init__()
        self.low, self.tp = low, tp
        self.a = make_parameter(ParamSpec((low.rank, in_features), 1, std=low.a_std, bound=low.a_bound), tp.axis)
        self.b = make_parameter(ParamSpec((out_features, low.rank), bound=low.b_bound), tp.axis)
        self.dropout = HiddenDropout(low.dropout, rng, differs=tp.axis.size > 1)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.tp.leave(F.linear(self.dropout(x), self.a))
        return F.linear(narrow, self.tp.between(self.b)) * self.low.scale


def add_to(outputs: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projections with what adapters make of the same input: (S, B, heads, D), or (S, B, out/t), and (S, B, out/t)."""
    return {
        name: output + changes[name].view_as(output) if name in changes else output for name, output in outputs.items()
    }
