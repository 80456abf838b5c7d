"""Adapters in the words of Hugging Face's peft: a config -> where they are in our model, and a table of their tensors.

What transformers keeps in one matrix has one A in peft, and so it has here; which modules a config means is asked of
peft itself. The tables follow from the family's: a `lora_B` has the rows of the weight that it changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_json
from megatron_ds.hf.family import Row
from megatron_ds.hf.files import read_table
from megatron_ds.hf.io import TensorSource
from megatron_ds.hf.mapping import STAR, Op, Part, Reader
from megatron_ds.hf.weights import read_share
from megatron_ds.layers.adapter import LowRank
from megatron_ds.layers.parameter import ParamSpec
from megatron_ds.models.adapted import AdapterPlace

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PROJECTION = re.compile(
    r"(?P<parent>.+\.(attention|cross|mlp))\.(qkv\.(?P<qkv>q|kv)_weight|(?P<one>out|up|down)\.weight)"
)

# Fields of peft's LoraConfig: those that we heed; those that must say what is given here; the rest is not about math.
HEEDED = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    }
)
MUST_BE: Mapping[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}
COSMETIC = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
    }
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
    where, raw = _read(source)
    config = _checked(where, raw)
    found = _projections(model)
    config.target_modules = _targets(where, config, model, found)
    modules = {name: parts for name, parts in found.items() if _matches(config, name)}
    others = {name.removesuffix(".weight") for row in model.table.values() for name in row.names} - found.keys()
    wrong = sorted(name for name in others if _matches(config, name))
    if wrong:
        raise ConversionError(
            f"{where}.target_modules matches {wrong[0]}, which cannot have an adapter here; supported: the projections "
            f"of attention and MLP, such as {next(iter(found))}"
        )
    if not modules:
        raise ConversionError(
            f"{where}.target_modules={_shown(config.target_modules)} matches nothing in a {model.family.model_type}; "
            f"supported: {', '.join(sorted({name.rpartition('.')[2] for name in found}))}"
        )
    low = {name: _low(config, name, parts[0], model) for name, parts in modules.items()}
    return Adapters(model, _content(config, model, base), modules, low)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "peft", dict(source)
    path = Path(source)
    file = path / ADAPTER_CONFIG if path.is_dir() else path
    if not file.is_file():
        raise ConversionError(f"peft={source}: no {ADAPTER_CONFIG} here; is it a directory that peft wrote?")
    return f"peft={source}", read_json(file)


def _checked(where: str, raw: Mapping[str, Any]) -> Any:
    """peft's own object, with nothing in it that we would ignore."""
    from peft import LoraConfig

    kind = str(raw.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise ConversionError(f"{where}.peft_type={kind} is not supported; supported: LORA")
    known = {field.name for field in fields(LoraConfig)}
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise ConversionError(f"{where}.{unknown[0]} is no field of peft's LoraConfig; remove it")
    for name, wanted in MUST_BE.items():
        if name in raw and raw[name] != wanted and not (raw[name] in (None, False) and not wanted):
            raise ConversionError(f"{where}.{name}={_shown(raw[name])} is not supported; nearest: {_shown(wanted)}")
    given = {name: value for name, value in raw.items() if name != "peft_type"}
    try:
        config = LoraConfig(**given)
    except (TypeError, ValueError) as problem:
        raise ConversionError(f"{where}: peft refuses it: {' '.join(str(problem).split())}") from problem
    if not isinstance(config.r, int) or config.r < 1:
        raise ConversionError(f"{where}.r={config.r} must be at least 1; nearest: 1")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ConversionError(
            f"{where}.init_lora_weights={config.init_lora_weights} is not supported; nearest: true, false or gaussian"
        )
    if not 0 <= config.lora_dropout < 1:
        raise ConversionError(f"{where}.lora_dropout={config.lora_dropout} is not in [0, 1); nearest: 0.0")
    return config


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


def _targets(where: str, config: Any, model: HFModel, found: Mapping[str, Any]) -> Any:
    """`target_modules` as peft would have it: of a model's kind where it says nothing, by name for "all-linear"."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    targets = config.target_modules
    if targets is None:
        if model.family.model_type not in USUAL:
            raise ConversionError(f"{where}.target_modules is missing; nearest: all-linear")
        return set(USUAL[model.family.model_type])
    return set(found) if targets == "all-linear" else targets


def _matches(config: Any, name: str) -> bool:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    match = check_target_module_exists(config, name)
    return bool(match) and not isinstance(match, _ExcludedModule)


def _low(config: Any, module: str, first: _Projection, model: HFModel) -> LowRank:
    """Rank, scale and start of one module's adapter, by peft's rules."""
    from peft.utils.other import get_pattern_key

    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
    width = math.prod(model.axis_sizes[axis] for axis in first.in_axes)
    gaussian, plain = config.init_lora_weights == "gaussian", config.init_lora_weights is False
    return LowRank(
        rank=rank,
        scale=alpha / math.sqrt(rank) if config.use_rslora else alpha / rank,
        dropout=config.lora_dropout,
        a_bound=None if gaussian else 1 / math.sqrt(width),
        a_std=1 / rank if gaussian else None,
        b_bound=1 / math.sqrt(rank) if plain else None,
    )


def _content(config: Any, model: HFModel, base: str) -> dict[str, Any]:
    from megatron_ds.models.config import DecoderConfig, EncoderDecoderConfig

    content = config.to_dict()
    if content.get("task_type") is None:
        kinds = {DecoderConfig: "CAUSAL_LM", EncoderDecoderConfig: "SEQ_2_SEQ_LM"}
        content["task_type"] = kinds.get(type(model.core))
    content.update(peft_type="LORA", base_model_name_or_path=base, inference_mode=True)
    return {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}


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


def _shown(value: Any) -> str:
    return str(sorted(value) if isinstance(value, set) else value)
