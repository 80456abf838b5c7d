"""Adapters of frozen parallel linear layers.

Low-rank adapters (Hu et al. 2021, LoRA) compute y = W x + s B A x, and with a magnitude for each output (Liu et al.
2024, DoRA; see dora.py) m * (W + s B A) x / ||W + s B A||; scalings of outputs or inputs (Liu et al. 2022, (IA)^3)
compute y = l * W x or y = W (l * x).

A low-rank adapter enters or leaves the tensor-parallel region at the r-wide product A x, so it communicates S B r
elements where its layer communicates S B H. Scalings communicate nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.param_spec import AxisSplit, Matrices, ParamSpec, make_parameter, over_tensor
from megatron_ds.layers.products import linear
from megatron_ds.parallel.collectives import copy_to, gather_sequence
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class LoRASpec:
    """A low-rank adapter (LoRA), independent of the layer that it adapts.

    Attributes:
        rank: r.
        scale: s.
        dropout: the dropout probability on the input of A.
        a_bound, a_std: A is initialised uniformly within ±bound, or normally; with zeros if both are None.
        b_bound: B is initialised uniformly within ±bound; 0 = with zeros, so that the adapter starts as the identity.
        dora: the rows of the adapted weight have learned norms.
        init: peft's name of an initialization that follows from the full weight or is drawn otherwise; None = the
            above.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    a_bound: float | None = None
    a_std: float | None = None
    b_bound: float | None = None
    dora: bool = False
    init: str | None = None

    @property
    def changes_base(self) -> bool:
        """The adapter begins with a part of the base weight, which loses it."""
        return self.init in ("pissa", "olora")

    @property
    def description(self) -> str:
        """The settings that distinguish it from other adapters, as text for errors."""
        others = (", DoRA" if self.dora else "", f", {self.init}" if self.changes_base else "")
        return f"r {self.rank}, scale {self.scale}{''.join(others)}"

    def a_spec(self, in_features: int, splits: tuple[AxisSplit, ...] = (), experts: tuple[int, ...] = ()) -> ParamSpec:
        """Return the declaration of A: (r, in), or one for each of `experts`."""
        shape = (*experts, self.rank, in_features)
        return ParamSpec(shape, splits, std=self.a_std, bound=self.a_bound, matrices=Matrices())

    def b_spec(self, out_features: int, splits: tuple[AxisSplit, ...] = (), experts: tuple[int, ...] = ()) -> ParamSpec:
        """Return the declaration of B: (out, r), or one for each of `experts`."""
        return ParamSpec((*experts, out_features, self.rank), splits, bound=self.b_bound, matrices=Matrices())


@dataclass(frozen=True)
class IA3Spec:
    """A vector that multiplies the output of a layer, bias included, or its input.

    Attributes:
        of_input: the vector multiplies the input.
        std: standard deviation of the vector's normal initialisation; None = it is initialised with ones.
    """

    of_input: bool
    std: float | None = None

    @property
    def description(self) -> str:
        """The settings that distinguish it from other adapters, as text for errors."""
        return f"a scaling of its {'input' if self.of_input else 'output'}"


@dataclass(frozen=True)
class Output:
    """One of the projections that share an adapter's A.

    Attributes:
        size: output features of the full layer.
        units: the number of indivisible units (key and value heads) that they consist of; None = they may be divided
            anywhere.
    """

    size: int
    units: int | None = None


@dataclass(frozen=True)
class AdaptableWeight:
    """A weight of an attention or feed-forward layer that adapters can change.

    Attributes:
        name: of the parameter in the layer, such as "qkv.kv_weight".
        outputs: names of the projections in it, in the order in which they lie there; `adapt` takes them.
        is_column: the tensor axis divides the output features, or several projections share an input; otherwise it
            divides the input features or nothing.
        module: name in the layer of the module whose `adapt` adds the adapter; "" = the layer itself.
        is_bare: transformers has it as a parameter of a module of another kind than a linear layer.
        low_rank_only: its adapters are low-rank, without a learned magnitude.
    """

    name: str
    outputs: tuple[str, ...]
    is_column: bool
    module: str = ""
    is_bare: bool = False
    low_rank_only: bool = False


@dataclass(frozen=True)
class FrozenLayer:
    """Access to the frozen layer of a DoRA adapter: its weights, biases and outputs by projection.

    Attributes:
        parameters: those that it reads, which ZeRO-3 must gather for the adapter too.
        weights: returns name of a projection -> its weight on this rank, (out/t, in) or (out, in/t).
        biases: returns name of a projection -> its bias on this rank, (out/t,) or (out,); None = it has none.
        project: input -> outputs by name of the projection.
    """

    parameters: tuple[nn.Parameter, ...]
    weights: Callable[[], Mapping[str, Tensor]]
    biases: Callable[[], Mapping[str, Tensor | None]]
    project: Callable[[Tensor], Mapping[str, Tensor]]


class ColumnAdapter(nn.Module):
    """The adapter term s B A x of a column-parallel layer.

    (S, B, H), or (S/t, B, H) under sequence parallelism -> (S, B, out/t). Forward: nothing, or an all-gather of the
    r-wide product. Backward: all-reduce or reduce-scatter of its gradient. Where neighbouring ranks hold the same
    shard, its gradient is summed over them.

    Args:
        in_features: H.
        outputs: name -> a projection of x; those that are one matrix in Hugging Face's format share one A.
        low: rank, scale, dropout and initialisation.
        tp: the tensor axis.
        rng: random streams of the dropout.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str, Output],
        low: LoRASpec,
        tp: TensorParallel,
        rng: RngStreams | None,
    ) -> None:
        super().__init__()
        self.low, self.tp = low, tp
        self.a = make_parameter(low.a_spec(in_features), tp.axes)
        self.num_shards = {}
        for name, output in outputs.items():
            spec = low.b_spec(output.size, over_tensor(0, output.units))
            # not in a child module: ZeRO-3 gathers a module's own parameters only
            self.register_parameter(f"b_{name}", make_parameter(spec, tp.axes))
            self.num_shards[name] = spec.num_shards("tensor", tp.axis.size)
        self.dropout = HiddenDropout(low.dropout, rng, differs=tp.splits_sequence)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the adapter term of each projection, by name: (S, B, heads, D) or (S, B, out/t)."""
        return self.changes(self.dropout(x))

    def changes(self, x: Tensor) -> dict[str, Tensor]:
        """Return the adapter terms of x as it is, without dropout."""
        narrow = linear(x, self.tp.between(self.a))
        axis = self.tp.axis
        narrow = gather_sequence(narrow, axis) if self.tp.splits_sequence else copy_to(narrow, axis)
        return {
            name: linear(narrow, self.tp.shared(self.get_parameter(f"b_{name}"), num_shards)) * self.low.scale
            for name, num_shards in self.num_shards.items()
        }

    def adapted(self, x: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the adapter term of x to the layer's outputs, by name of the projection.

        Args:
            x: the layer's input.
            outputs: the layer's outputs, (..., heads, D) or (..., out/t).
        """
        changes = self(x)
        return {
            name: output + changes[name].view_as(output) if name in changes else output
            for name, output in outputs.items()
        }


class ColumnScaling(nn.Module):
    """A scaling l * y of the outputs of a column-parallel layer.

    Forward: nothing. Backward: where neighbouring ranks hold the same shard of l, its gradient is summed over them.

    Args:
        outputs: name -> a projection.
        scaling: the adapter; it scales outputs.
        tp: the tensor axis.
    """

    def __init__(self, outputs: Mapping[str, Output], scaling: IA3Spec, tp: TensorParallel) -> None:
        super().__init__()
        assert not scaling.of_input, "projections of one input cannot each scale it"
        self.tp = tp
        self.num_shards = {}
        for name, output in outputs.items():
            spec = ParamSpec((output.size, 1), over_tensor(0, output.units), std=scaling.std, fill=1.0)
            self.register_parameter(f"l_{name}", make_parameter(spec, tp.axes))
            self.num_shards[name] = spec.num_shards("tensor", tp.axis.size)

    def forward(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        """Scale the outputs, given in the order of the projections, each (S, B, heads, D) or (S, B, out/t)."""
        return tuple(
            output * self.tp.shared(self.get_parameter(f"l_{name}"), num_shards).view(output.shape[2:])
            for (name, num_shards), output in zip(self.num_shards.items(), outputs, strict=True)
        )

    def adapted(self, x: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale the layer's outputs; see `ColumnAdapter.adapted`."""
        return {**outputs, **dict(zip(self.num_shards, self(*(outputs[name] for name in self.num_shards))))}


class RowAdapter(nn.Module):
    """The adapter term s B A x of a row-parallel layer.

    (S, B, in/t) -> (S, B, H), or (S/t, B, H) under sequence parallelism. Forward: all-reduce or reduce-scatter of the
    r-wide product. Backward: nothing, or an all-gather.

    Args:
        in_features, out_features: sizes of the full layer.
        low: rank, scale, dropout and initialisation.
        tp: the tensor axis.
        rng: random streams of the dropout; its masks differ between tensor ranks, which hold different features.
    """

    def __init__(
        self, in_features: int, out_features: int, low: LoRASpec, tp: TensorParallel, rng: RngStreams | None
    ) -> None:
        super().__init__()
        self.low, self.tp = low, tp
        self.a = make_parameter(low.a_spec(in_features, over_tensor(1)), tp.axes)
        self.b = make_parameter(low.b_spec(out_features), tp.axes)
        self.dropout = HiddenDropout(low.dropout, rng, differs=tp.axis.size > 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.dropout(x))

    def change(self, x: Tensor) -> Tensor:
        """Return the adapter term of x as it is, without dropout."""
        narrow = self.tp.leave(linear(x, self.a))
        return linear(narrow, self.tp.between(self.b)) * self.low.scale

    def around(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `layer(x)` plus the adapter term of x."""
        return layer(x) + self(x)


class ReplicatedAdapter(nn.Module):
    """The adapter term s B A x of a layer whose weight every tensor rank has in full.

    (..., in) -> (..., out), in the dtype of x. Forward: nothing. Backward: for A and for B, as `enter` communicates.

    Args:
        in_features, out_features: sizes of the layer.
        low: rank, scale, dropout and initialisation.
        tp: the tensor axis.
        rng: random streams of the dropout.
        enter: how A and B enter the graph, as the weight of the layer does; None = `tp.between`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        low: LoRASpec,
        tp: TensorParallel,
        rng: RngStreams | None,
        enter: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.low, self.enter = low, enter or tp.between
        self.a = make_parameter(low.a_spec(in_features), tp.axes)
        self.b = make_parameter(low.b_spec(out_features), tp.axes)
        self.dropout = HiddenDropout(low.dropout, rng, differs=tp.splits_sequence)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.enter(one).to(x.dtype) for one in (self.a, self.b))
        return linear(linear(self.dropout(x), a), b) * self.low.scale


class RowScaling(nn.Module):
    """A scaling l * y of a row-parallel layer's output, or l * x of its input, (S, B, in/t).

    Args:
        in_features, out_features: sizes of the full layer.
        scaling: the adapter, which states whether it scales the input.
        tp: the tensor axis.
    """

    def __init__(self, in_features: int, out_features: int, scaling: IA3Spec, tp: TensorParallel) -> None:
        super().__init__()
        self.scaling, self.tp = scaling, tp
        shape, splits = ((1, in_features), over_tensor(1)) if scaling.of_input else ((out_features, 1), ())
        self.l = make_parameter(ParamSpec(shape, splits, std=scaling.std, fill=1.0), tp.axes)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.l if self.scaling.of_input else self.tp.between(self.l)).flatten()

    def around(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `layer(x)` with its input or output scaled; see `RowAdapter.around`."""
        return layer(self(x)) if self.scaling.of_input else self(layer(x))
