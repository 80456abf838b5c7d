"""Adapters of Hugging Face's peft: their places in our model by a peft config, and a table of their tensors.

Projections that share a matrix in transformers share one A in peft, and here too. peft itself decides which modules a
config matches. The tables follow from the family's table: a `lora_B` has the rows of the weight that it changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import Row
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig
from megatron_ds.hf.tensor_files import read_table
from megatron_ds.hf.tensor_mapping import STAR, FusedPiece, Op, Reader
from megatron_ds.hf.weight_files import TensorSource
from megatron_ds.hf.weights import read_shard
from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.models.adapters import AdapterPlace
from megatron_ds.parallel.grid import Axes

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Projection:
    """A source of a native weight: one projection of an attention or feed-forward layer.

    Attributes:
        native: the weight's name.
        row: its row.
        source: index of the projection among the row's sources.
        parent, output: name of the layer that has the weight, and the projection's name in that layer.
        is_column: whether the tensor axis divides the output features.
    """

    native: str
    row: Row
    source: int
    parent: str
    output: str
    is_column: bool

    @property
    def in_dim(self) -> str:
        """Pattern of the input features."""
        return _dims(self.row.op.native)[-1]

    @property
    def in_axes(self) -> list[str]:
        return self.in_dim.strip("()").split()


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        model: the base model.
        config: content of adapter_config.json.
        modules: peft's name of each adapted module -> its projections. There is one adapter per module.
        adapters: the adapters by the same names.
    """

    model: HFModel
    config: dict[str, Any]
    modules: Mapping[str, tuple[_Projection, ...]]
    adapters: Mapping[str, LoRASpec | IA3Spec]

    @property
    def places(self) -> list[AdapterPlace]:
        """Places of the adapters in our model."""
        return [
            AdapterPlace(projections[0].parent, tuple(one.output for one in projections), self.adapters[module])
            for module, projections in self.modules.items()
        ]

    @cached_property
    def table(self) -> dict[str, Row]:
        """Native name -> row, for each parameter of the adapters."""
        return {row.native: row for module in self.modules for row in self._rows(module)}

    @cached_property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the named axes of `table`: the model's, and one for each LoRA rank."""
        ranks = {1, *(one.rank for one in self.adapters.values() if isinstance(one, LoRASpec))}
        return {**self.model.axis_sizes, **{f"r{rank}": rank for rank in ranks}}

    def merge(self, native: str, full: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Merge adapters into a full base weight or bias, in fp32: W + s B A, or W times l.

        Args:
            native: name of the weight or bias.
            full: its full value, which is not changed.
            parameters: full parameters of the adapters, by native name.

        Returns:
            `full` itself if no adapter changes it, otherwise a new tensor in fp32.
        """
        merged = full
        for module, one, row in self._changes.get(native, ()):
            if merged is full:
                merged = full.float().clone(memory_format=torch.contiguous_format)
            name, adapter = self._native(module), self.adapters[module]
            slot = row.op.slot(one.source, merged, self.axis_sizes)
            if isinstance(adapter, LoRASpec):
                change = parameters[_name_of("b", name, one)].float() @ parameters[f"{name}.a"].float()
                slot += (adapter.scale * change).view(slot.shape)
                continue
            vector = parameters[f"{name}.l" if adapter.of_input else _name_of("l", name, one)].float()
            flat = slot.reshape(-1, vector.numel()) if adapter.of_input else slot.reshape(vector.numel(), -1)
            slot.copy_((flat * vector).view(slot.shape))  # (1, in), or (out, 1)
        return merged

    @cached_property
    def _changes(self) -> dict[str, list[tuple[str, _Projection, Row]]]:
        """Name of a base weight or bias -> the adapted modules that change it, with the projection and its row."""
        found: dict[str, list[tuple[str, _Projection, Row]]] = {}
        for module, projections in self.modules.items():
            adapter = self.adapters[module]
            for one in projections:
                found.setdefault(one.native, []).append((module, one, one.row))
                bias = re.sub("weight$", "bias", one.native)
                if isinstance(adapter, IA3Spec) and not adapter.of_input and bias in self.model.table:
                    found.setdefault(bias, []).append((module, one, self.model.table[bias]))
        return found

    def _native(self, module: str) -> str:
        projections = self.modules[module]
        return f"{projections[0].parent}.adapters.{'_'.join(one.output for one in projections)}"

    def _rows(self, module: str) -> Iterator[Row]:
        projections, adapter = self.modules[module], self.adapters[module]
        name, first = self._native(module), projections[0]
        theirs = f"{_PREFIX}{module}"
        if isinstance(adapter, LoRASpec):
            yield _a_row(f"{name}.a", f"{theirs}.lora_A.weight", first, f"r{adapter.rank}")
            for one in projections:
                yield _b_row(_name_of("b", name, one), f"{theirs}.lora_B.weight", one, f"r{adapter.rank}")
        elif adapter.of_input:
            yield _a_row(f"{name}.l", f"{theirs}.ia3_l", first, "r1")
        else:
            for one in projections:
                yield _b_row(_name_of("l", name, one), f"{theirs}.ia3_l", one, "r1")


class AdapterReader:
    """Reader of adapters' native parameters from a directory in peft's format. Opening it accounts for every tensor.

    Args:
        directory: directory with adapter_model.safetensors.
        adapters: the adapters by its config.

    Raises:
        ConversionError: no weights, or a tensor is missing, unexpected or of another shape.
    """

    def __init__(self, directory: str | Path, adapters: Adapters) -> None:
        self.directory, self.adapters = Path(directory), adapters
        file = self.directory / ADAPTER_WEIGHTS
        if not file.is_file():
            raise ConversionError(f"{directory}: no {ADAPTER_WEIGHTS} here")
        self._source = TensorSource(self.directory, {file: read_table(file)})
        self._account()

    def shard(self, name: str, spec: ParamSpec, axes: Axes) -> Tensor:
        """Read a rank's shard of one native parameter; see `HFWeights.shard`."""
        row = self.adapters.table[name]
        return read_shard(row, self.adapters.axis_sizes, self._reader(row), spec, axes)

    def full(self, name: str) -> Tensor:
        """Read one full native parameter."""
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
    """Read a peft config and find the modules of a model that it adapts.

    Args:
        source: a directory with adapter_config.json, that file, or its content.
        model: the base model.
        base: path of the base model, for the written config.

    Raises:
        ConversionError: peft refuses the config, a value is not supported, or it matches no module or a module that
            cannot be adapted.
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
    adapters = {
        name: config.adapter(name, prod(sizes[axis] for axis in parts[0].in_axes)) for name, parts in modules.items()
    }
    for name, parts in modules.items():
        adapter = adapters[name]
        if isinstance(adapter, IA3Spec) and adapter.of_input and parts[0].is_column:
            raise ConversionError(
                f"{config.where}.feedforward_modules matches {name}, whose input others take too; supported: modules "
                "whose output goes into the residual stream, such as down_proj"
            )
    return Adapters(model, config.content(model, base), modules, adapters)


def _projections(model: HFModel) -> dict[str, tuple[_Projection, ...]]:
    """Return transformers' name of each module that can be adapted -> its projections, in their order in it."""
    weights = {
        f"{parent}.{weight.name}": (parent, weight)
        for prefix, stack in model.core.stacks.items()
        for layer in range(stack.num_layers)
        for parent, shape in ((f"{prefix}.{layer}.{name}", shape) for name, shape in stack.sublayers(layer).items())
        for weight in shape.adaptable_weights
    }
    found: dict[str, list[_Projection]] = {}
    for native in filter(weights.__contains__, model.table):
        row, (parent, weight) = model.table[native], weights[native]
        for source, (name, output) in enumerate(zip(row.names, weight.outputs, strict=True)):
            one = _Projection(native, row, source, parent, output, weight.is_column)
            found.setdefault(name.removesuffix(".weight"), []).append(one)
    return {module: tuple(parts) for module, parts in found.items()}


def _a_row(native: str, theirs: str, first: _Projection, rank: str) -> Row:
    """Return the row of a parameter over the input features of a module."""
    pattern = f"{rank} {first.in_dim}"
    return Row(native, (theirs,), Op((pattern,), pattern), None if first.is_column else first.row.split)


def _b_row(native: str, theirs: str, one: _Projection, rank: str) -> Row:
    """Return the row of a parameter over the output features of a projection, in the order of its module."""
    out = " ".join(dim for dim in map(_without_star, _dims(one.row.op.native)[:-1]) if dim)
    source = one.row.op.sources[one.source]
    if isinstance(source, FusedPiece):
        given: str | FusedPiece = FusedPiece(f"{_out_dim(source.pattern, one.in_dim)} {rank}", source.piece)
    else:
        given = f"{_out_dim(source, one.in_dim)} {rank}"
    return Row(native, (theirs,), Op((given,), f"{out} {rank}"), one.row.split if one.is_column else None)


def _name_of(letter: str, native: str, projection: _Projection) -> str:
    return f"{native}.{letter}_{projection.output}" if projection.is_column else f"{native}.{letter}"


def _dims(pattern: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\S+", pattern)


def _without_star(dim: str) -> str:
    axes = [axis for axis in dim.strip("()").split() if axis != STAR]
    return f"({' '.join(axes)})" if len(axes) > 1 else "".join(axes)


def _out_dim(pattern: str, in_dim: str) -> str:
    """Return the output dim of the pattern of a weight with two dims."""
    dims = _dims(pattern)
    assert len(dims) == 2 and dims.count(in_dim) == 1, (pattern, in_dim)
    return dims[1 - dims.index(in_dim)]
