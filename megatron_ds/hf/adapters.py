"""Adapters in the words of Hugging Face's peft: a config -> where they are in our model, and a table of their tensors.

What transformers keeps in one matrix has one A in peft, and so it has here; which modules a config means is asked of
peft itself. The tables follow from the family's: a `lora_B` has the rows of the weight that it changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import Row
from megatron_ds.hf.files import read_table
from megatron_ds.hf.io import TensorSource
from megatron_ds.hf.mapping import STAR, Op, Part, Reader
from megatron_ds.hf.weights import read_share
from megatron_ds.layers.adapter import LowRank
from megatron_ds.layers.parameter import ParamSpec
from megatron_ds.models.adapted import AdapterPlace

_PREFIX = "base_model.model."
_PROJECTION = re.compile(
    r"(?P<parent>.+\.(attention|cross|mlp))\.(qkv\.(?P<qkv>q|kv)_weight|(?P<one>out|up|down)\.weight)"
)


@dataclass(frozen=True)
class _Projection:
    """A source of a native weight: one projection of an attention or MLP.

    Attributes:
        native: the weight's name.
        row: its row.
        source: index of the projection among the row's sources.
        parent, output: the module that has it, and what it is called there.
    """

    native: str
    row: Row
    source: int
    parent: str
    output: str

    @property
    def in_dim(self) -> str:
        """Pattern of the input features."""
        return _dims(self.row.op.native)[-1]

    @property
    def in_axes(self) -> list[str]:
        return self.in_dim.strip("()").split()

    @property
    def is_column(self) -> bool:
        """Whether the tensor axis divides the output features."""
        return self.output not in ("out", "down")


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        model: what is adapted.
        config: content of adapter_config.json.
        modules: peft's name of each module -> its projections, one adapter each.
        low: by the same names, what each adapter is.
    """

    model: HFModel
    config: dict[str, Any]
    modules: Mapping[str, tuple[_Projection, ...]]
    low: Mapping[str, LowRank]

    @property
    def places(self) -> list[AdapterPlace]:
        """Where they are in our model."""
        return [
            AdapterPlace(projections[0].parent, tuple(one.output for one in projections), self.low[module])
            for module, projections in self.modules.items()
        ]

    @cached_property
    def table(self) -> dict[str, Row]:
        """Native name -> row, one a parameter of the adapters."""
        return {row.native: row for module in self.modules for row in self._rows(module)}

    @cached_property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the named axes of `table`: the model's, and one for each rank."""
        return {**self.model.axis_sizes, **{f"r{low.rank}": low.rank for low in self.low.values()}}

    def merge(self, native: str, whole: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """W + s B A, computed in fp32: a whole base weight with what adapters add to it.

        Args:
            native: the weight's name.
            whole: the weight; unchanged.
            parameters: the adapters', whole, by native name.

        Returns:
            the weight itself if there is no adapter beside it, else a new one in fp32.
        """
        merged = whole
        for module, one in self._beside.get(native, ()):
            if merged is whole:
                merged = whole.float().clone(memory_format=torch.contiguous_format)
            name = self._native(module)
            change = parameters[_b_name(name, one)].float() @ parameters[f"{name}.a"].float()
            slot = one.row.op.slot(one.source, merged, self.axis_sizes)
            slot += (self.low[module].scale * change).view(slot.shape)
        return merged

    @cached_property
    def _beside(self) -> dict[str, list[tuple[str, _Projection]]]:
        """Name of a base weight -> the modules that are, or hold, projections of it."""
        found: dict[str, list[tuple[str, _Projection]]] = {}
        for module, projections in self.modules.items():
            for one in projections:
                found.setdefault(one.native, []).append((module, one))
        return found

    def _native(self, module: str) -> str:
        projections = self.modules[module]
        return f"{projections[0].parent}.adapters.{'_'.join(one.output for one in projections)}"

    def _rows(self, module: str) -> Iterator[Row]:
        projections, rank = self.modules[module], f"r{self.low[module].rank}"
        name, first = self._native(module), projections[0]
        split = None if first.is_column else first.row.split
        a = Op((f"{rank} {first.in_dim}",), f"{rank} {first.in_dim}")
        yield Row(f"{name}.a", (f"{_PREFIX}{module}.lora_A.weight",), a, split)
        for one in projections:
            out = " ".join(dim for dim in map(_without_star, _dims(one.row.op.native)[:-1]) if dim)
            source = one.row.op.sources[one.source]
            if isinstance(source, Part):
                given: str | Part = Part(f"{_out_dim(source.pattern, one.in_dim)} {rank}", source.piece)
            else:
                given = f"{_out_dim(source, one.in_dim)} {rank}"
            op, split = Op((given,), f"{out} {rank}"), one.row.split if one.is_column else None
            yield Row(_b_name(name, one), (f"{_PREFIX}{module}.lora_B.weight",), op, split)


class AdapterWeights:
    """Read native parameters of adapters out of a directory that peft, or we, wrote. Opening it accounts for all.

    Args:
        directory: with adapter_model.safetensors.
        adapters: what its config says.

    Raises:
        ConversionError: no weights, or a tensor that is missing, unexpected or misshapen.
    """

    def __init__(self, directory: str | Path, adapters: Adapters) -> None:
        self.directory, self.adapters = Path(directory), adapters
        file = self.directory / ADAPTER_WEIGHTS
        if not file.is_file():
            raise ConversionError(f"{directory}: no {ADAPTER_WEIGHTS} here")
        self._source = TensorSource(self.directory, {file: read_table(file)})
        self._account()

    def share(self, name: str, spec: ParamSpec, rank: int, size: int) -> Tensor:
        """A tensor rank's share of one native parameter; see `HFWeights.share`."""
        row = self.adapters.table[name]
        return read_share(row, self.adapters.axis_sizes, self._reader(row), spec, rank, size)

    def whole(self, name: str) -> Tensor:
        """One whole native parameter."""
        row = self.adapters.table[name]
        return row.op.read(self._reader(row), self.adapters.axis_sizes)

    def _reader(self, row: Row) -> Reader:
        return lambda source: self._source.tensor(row.names[source])

    def _account(self) -> None:
        sizes = self.adapters.axis_sizes
        wanted = {row.names[0]: row.op.source_shape(0, sizes) for row in self.adapters.table.values()}
        found = set(self._source.names)
        for what, names in (("missing", wanted.keys() - found), ("unexpected", found - wanted.keys())):
            if names:
                raise ConversionError(f"{self.directory}: {what} {min(names)}, by its {ADAPTER_CONFIG} and this model")
        for name, shape in wanted.items():
            if self._source.shape(name) != shape:
                raise ConversionError(
                    f"{self.directory}: {name} has shape {list(self._source.shape(name))}, its {ADAPTER_CONFIG} and "
                    f"this model say {list(shape)}"
                )


def read_adapters(source: str | Path | Mapping[str, Any], model: HFModel, base: str) -> Adapters:
    """The adapters that a config of peft means.

    Args:
        source: a directory with adapter_config.json, that file, or its content.
        model: what is adapted.
        base: where the model is, which is written into the config.

    Raises:
        ConversionError: peft refuses it, it says what is not supported, or it matches nothing or what cannot be
            adapted.
    """
    config, found = AdapterConfig(source), _projections(model)
    targets = config.settle_targets(model, found)
    modules = {name: parts for name, parts in found.items() if config.matches(name)}
    others = {name.removesuffix(".weight") for row in model.table.values() for name in row.names} - found.keys()
    wrong = sorted(filter(config.matches, others))
    if wrong:
        raise ConversionError(
            f"{config.where}.target_modules matches {wrong[0]}, which cannot have an adapter here; supported: the "
            f"projections of attention and MLP, such as {next(iter(found))}"
        )
    if not modules:
        raise ConversionError(
            f"{config.where}.target_modules={targets} matches nothing in a {model.family.model_type}; supported: "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in found}))}"
        )
    sizes = model.axis_sizes
    low = {
        name: config.low_rank(name, prod(sizes[axis] for axis in parts[0].in_axes)) for name, parts in modules.items()
    }
    return Adapters(model, config.content(model, base), modules, low)


def _projections(model: HFModel) -> dict[str, tuple[_Projection, ...]]:
    """Every module of transformers that can be adapted -> its projections, in the order in which they lie in it."""
    found: dict[str, list[_Projection]] = {}
    for native, row in model.table.items():
        match = _PROJECTION.fullmatch(native)
        if match is None:
            continue
        if match["qkv"]:
            outputs: Sequence[str] = ("q",) if match["qkv"] == "q" else ("k", "v")
        else:
            outputs = ("gate", "up") if len(row.names) > 1 else (match["one"],)
        for source, (name, output) in enumerate(zip(row.names, outputs, strict=True)):
            module = name.removesuffix(".weight")
            found.setdefault(module, []).append(_Projection(native, row, source, match["parent"], output))
    return {module: tuple(parts) for module, parts in found.items()}


def _b_name(native: str, projection: _Projection) -> str:
    return f"{native}.b_{projection.output}" if projection.is_column else f"{native}.b"


def _dims(pattern: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\S+", pattern)


def _without_star(dim: str) -> str:
    axes = [axis for axis in dim.strip("()").split() if axis != STAR]
    return f"({' '.join(axes)})" if len(axes) > 1 else "".join(axes)


def _out_dim(pattern: str, in_dim: str) -> str:
    """The other dim of a weight's two."""
    dims = _dims(pattern)
    assert len(dims) == 2 and dims.count(in_dim) == 1, (pattern, in_dim)
    return dims[1 - dims.index(in_dim)]
