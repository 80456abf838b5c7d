"""Adapters of Hugging Face's peft: their places in our model by a peft config, and a table of their tensors.

Projections that share a matrix in transformers share one A in peft, and here too. peft itself decides which modules and
parameters a config matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ds.errors import ConversionError, nearest_names
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import Row
from megatron_ds.hf.peft.config import AdapterConfig
from megatron_ds.hf.peft.merging import merged_weight
from megatron_ds.hf.peft.new_head import head_modules
from megatron_ds.hf.peft.projections import (
    EXPERT_AXIS,
    Projection,
    find_projections,
    find_vocabulary_tables,
    in_memory,
    input_row,
    output_row,
)
from megatron_ds.hf.peft.saved_modules import (
    rows_of,
    saved_parameters,
    token_row,
    token_rows,
    untied,
    with_vocabulary,
)
from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec
from megatron_ds.models.adapters import AdapterPlace

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, and the modules that are trained in full with them.

    Attributes:
        base: the base model on disk.
        model: the model that is trained: the base, untied where tables are trained separately, or with the vocabulary
            of tables that replace the base's.
        config: content of adapter_config.json.
        modules: transformers' name of each adapted module or parameter -> its projections. Each has one adapter.
        adapters: the adapters by the same names.
        saved: native names of the base's parameters that are trained in full.
        replaced: native names of those that the file of the adapters replaces, and that are not trained.
        token_rows: native name of a table -> its rows that the file replaces.
    """

    base: HFModel
    model: HFModel
    config: dict[str, Any]
    modules: Mapping[str, tuple[Projection, ...]]
    adapters: Mapping[str, LoRASpec | IA3Spec]
    saved: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    token_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def places(self) -> list[AdapterPlace]:
        """Places of the adapters in our model."""
        return [
            AdapterPlace(projections[0].parent, tuple(one.output for one in projections), self.adapters[module])
            for module, projections in self.modules.items()
        ]

    @cached_property
    def table(self) -> dict[str, Row]:
        """Native name -> row, for each parameter of the adapters, trained in full, or replaced."""
        own = {row.native: row for module in self.modules for row in self._rows(module)}
        natives = [native for native in self.base_rows if native in self.saved | self.replaced]
        tokens = [token_row(native, len(rows), self.model, PREFIX) for native, rows in self.token_rows.items()]
        return own | {row.native: row for row in (*rows_of(natives, in_memory(self.model), PREFIX), *tokens)}

    @cached_property
    def base_rows(self) -> dict[str, Row]:
        """The rows of the base's parameters, by the names of transformers' modules in memory."""
        return in_memory(self.model).table

    @property
    def tensors(self) -> list[str]:
        """peft's names of the adapters' own tensors."""
        return [row.names[0] for module in self.modules for row in self._rows(module)]

    @cached_property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the named axes of `table`: the model's, one for each LoRA rank, and for each number of rows."""
        ranks = {1, *(one.rank for one in self.adapters.values() if isinstance(one, LoRASpec))}
        counts = {f"t{len(rows)}": len(rows) for rows in self.token_rows.values()}
        return {**self.model.axis_sizes, **{f"r{rank}": rank for rank in ranks}, **counts}

    def check_trainable(self) -> None:
        """Check that the layer of each adapted module can have an adapter.

        Raises:
            ConversionError: a module's adapter can only be merged.
        """
        if self.token_rows:
            raise ConversionError(
                "peft.trainable_token_indices works in export --merge only; try peft.modules_to_save=[embed_tokens]"
            )
        for module, projections in self.modules.items():
            if not projections[0].is_trainable:
                raise ConversionError(
                    f"peft.target_modules matches {module}, which cannot have an adapter here; supported: the "
                    f"projections of attention and MLP, such as {next(iter(find_projections(in_memory(self.base))))}; "
                    f"try modules_to_save, which trains it in full"
                )

    def with_replaced(self, replaced: frozenset[str], vocab_size: int) -> Adapters:
        """Return the same adapters with base parameters that their file replaces.

        Args:
            replaced: their native names.
            vocab_size: that of the tables among them.
        """
        return replace(self, model=with_vocabulary(self.model, vocab_size), replaced=replaced)

    def merge(self, native: str, full: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Merge adapters into a full base weight or bias, in fp32; see `merged_weight`.

        Args:
            native: name of the weight or bias.
            full: its full value, which is not changed.
            parameters: full parameters of the adapters, by native name.

        Returns:
            `full` itself if no adapter changes it, otherwise a new tensor in fp32.
        """
        if native in self.token_rows:
            full = full.clone()
            full[list(self.token_rows[native])] = parameters[f"{native}.token_rows"].to(full.dtype)
        changes = [
            (
                *(one, row, self.adapters[module]),
                {letter: parameters[name].float() for letter, name in self.names_of(module, one).items()},
            )
            for module, one, row in self.changes.get(native, ())
        ]
        return merged_weight(full, changes, self.axis_sizes)

    @cached_property
    def changes(self) -> dict[str, list[tuple[str, Projection, Row]]]:
        """Name of a base weight or bias -> the adapted modules that change it, with the projection and its row."""
        found: dict[str, list[tuple[str, Projection, Row]]] = {}
        for module, projections in self.modules.items():
            adapter = self.adapters[module]
            for one in projections:
                found.setdefault(one.native, []).append((module, one, one.row))
                bias = re.sub("weight$", "bias", one.native)
                if isinstance(adapter, IA3Spec) and not adapter.of_input and bias in self.base_rows:
                    found.setdefault(bias, []).append((module, one, self.base_rows[bias]))
        return found

    def names_of(self, module: str, one: Projection) -> dict[str, str]:
        """Return letter -> native name, for the adapter's parameters that concern one projection."""
        name, adapter = self._native(module), self.adapters[module]
        if isinstance(adapter, IA3Spec):
            return {"l": f"{name}.l" if adapter.of_input else _name_of("l", name, one)}
        return {"a": f"{name}.a", **{letter: _name_of(letter, name, one) for letter in ("bm" if adapter.dora else "b")}}

    def _native(self, module: str) -> str:
        projections = self.modules[module]
        return f"{projections[0].parent}.adapters.{'_'.join(one.output for one in projections)}"

    def _rows(self, module: str) -> Iterator[Row]:
        projections, adapter = self.modules[module], self.adapters[module]
        name, first = self._native(module), projections[0]
        theirs = f"{PREFIX}{_wrapper(module, self.modules) if first.is_bare else module}"
        if isinstance(adapter, LoRASpec):
            a, b = ("lora_embedding_A", "lora_embedding_B") if first.is_lookup else ("lora_A.weight", "lora_B.weight")
            yield input_row(f"{name}.a", f"{theirs}.{a}", first, f"r{adapter.rank}")
            for one in projections:
                yield output_row(_name_of("b", name, one), f"{theirs}.{b}", one, f"r{adapter.rank}")
                if adapter.dora:
                    yield output_row(_name_of("m", name, one), f"{theirs}.lora_magnitude_vector", one, None)
        elif adapter.of_input:
            yield input_row(f"{name}.l", f"{theirs}.ia3_l", first, "r1")
        else:
            for one in projections:
                yield output_row(_name_of("l", name, one), f"{theirs}.ia3_l", one, "r1")


def read_adapters(source: str | Path | Mapping[str, Any], model: HFModel, base: str) -> Adapters:
    """Read a peft config and find the modules of a model that it adapts.

    A head for labels is trained in full, as in peft.

    Args:
        source: a directory with adapter_config.json, that file, or its content.
        model: the base model.
        base: path of the base model, for the written config.

    Raises:
        ConversionError: peft refuses the config, a value is not supported, or it matches no module or a module that
            cannot be adapted; blocks share their parameters.
    """
    config, named = AdapterConfig(source), in_memory(model)
    if any(stack.shared_blocks for stack in model.core.stacks.values()):
        raise ConversionError(
            f"{config.where} does not work on model_type={model.family.model_type}, whose blocks share their "
            "parameters: each would have adapters of its own; remove it, to train all parameters"
        )
    if model.core.labels is not None and (config.starts or model.replaced is not None):
        config.save_too(head_modules(model))
    trained, saved = untied(model, saved_parameters(config.modules_to_save, named, config.where), config.keeps_tied)
    found = find_projections(in_memory(trained))
    linear = {name: parts for name, parts in found.items() if not parts[0].is_bare}
    names = [name for row in named.table.values() for name in row.names]
    targets = config.settle_targets(model, linear, names)
    tables = find_vocabulary_tables(in_memory(trained)) if config.kind == "LORA" else {}
    modules = {name: parts for name, parts in (linear | tables).items() if config.matches(name)}
    _refuse_others(config, names, found, tables)
    bare = {name: parts for name, parts in found.items() if name not in linear and config.matches_parameter(name)}
    modules |= bare
    if not modules:
        raise ConversionError(
            f"{config.where}.target_modules={targets} matches nothing in a {model.family.model_type}; supported: "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
        )
    if bare:
        config.check_bare(next(iter(bare)))
    adapters = {name: _adapter(config, model, name, parts) for name, parts in modules.items()}
    rows = token_rows(config.token_rows, trained, config.where)
    if model.family.passes_through:
        config.name_targets([name for name in modules if name not in bare])
    return Adapters(model, trained, config.content(model, base), modules, adapters, saved, token_rows=rows)


def _refuse_others(
    config: AdapterConfig,
    names: Sequence[str],
    found: Mapping[str, tuple[Projection, ...]],
    tables: Mapping[str, tuple[Projection, ...]],
) -> None:
    """Check that the config matches no module or parameter that cannot be adapted.

    Args:
        config: the config.
        names: of all tensors in memory.
        found: names of modules and bare parameters that can be adapted -> their projections.
        tables: those of the vocabulary.
    """
    linear, bare = ([name for name, parts in found.items() if parts[0].is_bare == kind] for kind in (False, True))
    others = {name.removesuffix(".weight") for name in names if name not in bare}
    holders = {name.rpartition(".")[0] for name in bare}
    wrong = sorted(filter(config.matches, (others | holders) - {*linear, *tables}))
    if wrong:
        raise ConversionError(
            f"{config.where}.target_modules matches {wrong[0]}, which cannot have an adapter here; supported: the "
            f"projections of attention and MLP, such as {linear[0]}"
        )
    wrong = [name for name in names if name not in bare and config.matches_parameter(name)]
    if wrong:
        nearest = f"supported: {', '.join(map(_end, bare[:3]))}" if bare else "the model has no experts; remove it"
        raise ConversionError(
            f"{config.where}.target_parameters matches {wrong[0]}, which cannot have an adapter here; {nearest}"
        )
    for target in config.parameters if bare and not config.is_file else ():
        if not any(name == target or name.endswith(f".{target}") for name in bare):
            raise ConversionError(
                f"{config.where}.target_parameters={target} matches no parameter; nearest: "
                f"{' or '.join(nearest_names(target, sorted({*map(_end, bare)})) or sorted({*map(_end, bare)}))}"
            )


def _end(name: str) -> str:
    """Return the last two parts of a name."""
    return ".".join(name.split(".")[-2:])


def _wrapper(parameter: str, adapted: Mapping[str, tuple[Projection, ...]]) -> str:
    """Return peft's name of the module with the adapter of a bare parameter.

    peft wraps the module that has the parameter, once for each of its adapted parameters: the first innermost.
    """
    module = parameter.rpartition(".")[0]
    wrapped = [name for name, (first, *_) in adapted.items() if first.is_bare and name.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(wrapped) - 1 - wrapped.index(parameter))


def _adapter(config: AdapterConfig, model: HFModel, module: str, parts: tuple[Projection, ...]) -> LoRASpec | IA3Spec:
    adapter = config.adapter(module, prod(model.axis_sizes[axis] for axis in parts[0].in_axes))
    if parts[0].low_rank_only and not (isinstance(adapter, LoRASpec) and not adapter.dora):
        kind = "use_dora" if isinstance(adapter, LoRASpec) else "peft_type=IA3"
        raise ConversionError(
            f"{config.where}.{kind} does not work on {module}, which can have a LoRA adapter alone; try "
            f"exclude_modules=[{module.rpartition('.')[2]}]"
        )
    if parts[0].is_of_experts:
        assert isinstance(adapter, LoRASpec), adapter
        # in peft the matrix B of all experts has inputs of experts * rank
        bound = adapter.b_bound / sqrt(model.axis_sizes[EXPERT_AXIS]) if adapter.b_bound is not None else None
        adapter = replace(adapter, b_bound=bound)
    if isinstance(adapter, IA3Spec) and adapter.of_input and parts[0].is_column:
        raise ConversionError(
            f"{config.where}.feedforward_modules matches {module}, whose input others take too; supported: modules "
            "whose output goes into the residual stream, such as down_proj"
        )
    return replace(adapter, init=None) if isinstance(adapter, LoRASpec) and parts[0].is_lookup else adapter


def _name_of(letter: str, native: str, projection: Projection) -> str:
    return f"{native}.{letter}_{projection.output}" if projection.is_column else f"{native}.{letter}"
