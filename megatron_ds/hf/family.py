"""Families of Hugging Face models: a table of rows, rules for config fields, and a translation of the config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.fields_read import fields_read
from megatron_ds.hf.special_floats import decode_floats
from megatron_ds.hf.spread_mapping import Mapped, Spread
from megatron_ds.hf.tensor_mapping import FusedPiece, Op, copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.config import ModelConfig

LAYER = "{n}"
EXPERT = "{x}"
HEAD = "head.weight"
EMBEDDING = "embedding.weight"


class Part(NamedTuple):
    """A native parameter, or one expert of it: without the dim of the experts.

    Attributes:
        name: native name of the parameter.
        expert: index of the expert; None = the complete parameter.
    """

    name: str
    expert: int | None = None


@dataclass(frozen=True)
class Row:
    """One native parameter and its Hugging Face tensors; `{n}` stands for the index of the layer.

    Attributes:
        native: name of the native parameter.
        names: names on disk, one for each source of `op`.
        op: the bijection between them.
        split: the named axis that tensor parallelism divides, or expert parallelism (x); None = replicated.
        copies: names of further tensors with the content of the only one in `names`; they are written, not read.
        layers: the layers that have it; None = all layers of the stack.
        keeps_dtype: an export in another dtype leaves it in its own.
    """

    native: str
    names: tuple[str, ...]
    op: Mapped
    split: str | None = None
    copies: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    keeps_dtype: bool = False

    def at(self, layer: int) -> Row:
        """Return the row of one layer."""
        number = str(layer)
        names = tuple(name.replace(LAYER, number) for name in self.names)
        return replace(self, native=self.native.replace(LAYER, number), names=names, layers=None)

    @property
    def parts(self) -> list[Part]:
        """The smallest parts with Hugging Face tensors of their own: experts that are stored one by one, or all."""
        experts = range(self.op.count) if isinstance(self.op, Spread) and self.split == "x" else (None,)
        return [Part(self.native, expert) for expert in experts]

    def of(self, expert: int | None) -> Row:
        """Return the row of one expert, whose tensors are stored one by one; None = this row."""
        if expert is None:
            return self
        assert isinstance(self.op, Spread), f"{self.native}: no tensor is of one expert alone"
        each = len(self.op.one.sources)
        return replace(self, names=self.names[expert * each : (expert + 1) * each], op=self.op.one, split=None)


def _unchanged(config: Any, names: frozenset[str]) -> Any:
    return config


def _as_given(raw: Mapping[str, Any]) -> dict[str, Any]:
    return dict(raw)


def _no_names(config: Any) -> tuple[str, ...]:
    return ()


def _no_options(config: Any) -> dict[str, Any]:
    return {}


def _no_ids(config: Any) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Family:
    """One Hugging Face `model_type`.

    Attributes:
        model_type, architecture: as in config.json; the class of transformers, by default if the config names no other.
        prefix: prefix of tensor names that saves of the base model leave out.
        fields: rules for its config fields.
        translate: transformers' config object -> `ModelConfig`.
        rows: `ModelConfig` -> rows of the table.
        ignored: regular expressions of tensors on disk that are buffers, not weights.
        reference_attention: transformers' implementation of attention to compare with. "eager" computes the formula;
            kernels leave out options that they do not support, such as a bound of the scores.
        aliases: name on disk -> name in the table that it is a copy of, in old or careless saves.
        module: name of the Python module that holds the classes of its models.
        classes: classes of transformers that differ in their heads -> options of `ModelConfig` that distinguish them.
        detect_heads: `ModelConfig`, names on disk -> `ModelConfig` with the heads that are on disk.
        unused_tensors: `ModelConfig` -> names of weights of the family's other classes, which transformers leaves out
            of the class with these heads.
        further_modules: transformers' config object -> regular expressions of weights of modules that its class of the
            model leaves out, such as those that predict further tokens.
        tied_by_bytes: the head is the embedding unless both are on disk and differ, whatever the config says.
        config_overrides: `ModelConfig` -> fields of config.json that have another meaning in this family.
        complete_fields: fields of config.json -> the same fields, and those that its config class needs; it raises a
            ConversionError for fields that the class misreads.
        other_rows: tables of other forms in which its weights are on disk; they are read like that of `rows`.
        load_options: `ModelConfig` -> options of transformers' `from_pretrained` that no config field replaces.
        old_rope_names: name of a rope field of transformers 4 -> the name that it has in this family; None = it has no
            such field.
        same_as: the family that has the same tensors, if this one is another name of it.
        always_named: every config.json of it names its `model_type`; it is not searched for by fields and tensors.
        passes_through: regular expressions of tensors of modules that are not trained here, such as a vision tower.
            They are never loaded to a device, and exports have them byte for byte; config.json is kept as it is.
        placeholder_ids: transformers' config object -> field of config.json -> id of a token that stands for something
            else than text, such as a part of an image; no text may hold it.
    """

    model_type: str
    architecture: str
    prefix: str
    fields: FieldRules
    translate: Callable[[Any], Any]
    rows: Callable[[Any], list[Row]]
    ignored: tuple[str, ...] = ()
    reference_attention: str = "eager"
    aliases: Mapping[str, str] = field(default_factory=dict)
    module: str = "transformers"
    classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    detect_heads: Callable[[Any, frozenset[str]], Any] = _unchanged
    unused_tensors: Callable[[Any], tuple[str, ...]] = _no_names
    further_modules: Callable[[Any], tuple[str, ...]] = _no_names
    tied_by_bytes: bool = False
    config_overrides: Callable[[Any], dict[str, Any]] = _no_options
    complete_fields: Callable[[Mapping[str, Any]], dict[str, Any]] = _as_given
    other_rows: tuple[Callable[[Any], list[Row]], ...] = ()
    load_options: Callable[[Any], dict[str, Any]] = _no_options
    old_rope_names: Mapping[str, str | None] = field(default_factory=dict)
    same_as: str | None = None
    always_named: bool = False
    passes_through: tuple[str, ...] = ()
    placeholder_ids: Callable[[Any], Mapping[str, int]] = _no_ids

    def check_fields(self, raw: Mapping[str, Any]) -> list[str]:
        """Check a config's fields; returns those without effect, which transformers' code of the family does not read.

        Raises:
            ConversionError: see `FieldRules.check`.
        """
        return self.fields.check(raw, self._may_read)

    def parts_of_config(self, raw: Mapping[str, Any], config: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Yield the fields and transformers' config object of each part of a config that is translated."""
        yield raw, config

    def _may_read(self, name: str) -> bool:
        names = fields_read(self.model_type, self.module, self.architecture)
        return names is None or name in names

    def transformers_config(self, raw: Mapping[str, Any]) -> Any:
        """Return transformers' config object, which fills in defaults, translates old names and checks values.

        Raises:
            ConversionError: transformers refuses it.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.for_model(**{**decode_floats(deepcopy(dict(raw))), "model_type": self.model_type})
        except Exception as problem:  # transformers and huggingface_hub raise their own types, among them a KeyError
            reason = " ".join(str(problem.args[0] if problem.args else problem).split())
            raise ConversionError(f"transformers refuses it: {reason}") from problem

    def forms(self) -> Iterator[Family]:
        """Yield the family with each of its tables, the one that exports have first."""
        yield self
        yield from (replace(self, rows=rows) for rows in self.other_rows)

    def table(self, config: ModelConfig) -> dict[str, Row]:
        """Return native name -> row for each parameter of each layer; a tied head is included."""
        table = {}
        for row in self.rows(config):
            stack, dot, _ = row.native.partition(f".{LAYER}")
            layers = range(config.stacks[stack].num_stored_blocks if dot else 1)
            for layer in layers if row.layers is None else row.layers:
                one = row.at(layer)
                table[one.native] = one
        return table

    def architecture_of(self, config: ModelConfig) -> str:
        """Return the name of the class of transformers that has these heads."""
        for name, options in self.classes.items():
            if all(getattr(config, option) == value for option, value in options.items()):
                return name
        return self.architecture


def renamed(rows: Callable[[Any], list[Row]], names: Mapping[str, str]) -> Callable[[Any], list[Row]]:
    """Return a table with other names on disk.

    Args:
        rows: the table, a function of the config.
        names: one or more parts of a name -> parts that take their place, such as "self_attn.o_proj" ->
            "self_attn.dense". Only complete parts are found, and all are replaced at once: two names may be exchanged.
    """
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = re.compile(rf"(?<![^.])(?:{alternatives})(?![^.])")

    def rename(theirs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(found.sub(lambda match: names[match[0]], name) for name in theirs)

    def rows_renamed(config: Any) -> list[Row]:
        return [replace(row, names=rename(row.names), copies=rename(row.copies)) for row in rows(config)]

    return rows_renamed


def norm(native: str, theirs: str, style: NormStyle, axis: str = "h") -> list[Row]:
    """Return the rows of a norm over hidden states, or over another axis; none if it has no parameters."""
    parts = ("weight", "bias") if style.has_bias else ("weight",)
    return [Row(f"{native}.{part}", (f"{theirs}.{part}",), copy(axis)) for part in parts if style.affine]


def linear(native: str, theirs: str, weight: str, split: str | None, *, bias: bool = False) -> list[Row]:
    """Return the rows of a projection that is the same tensor in transformers.

    Args:
        native, theirs: names without `.weight` or `.bias`.
        weight: pattern of the weight, output features first.
        split: the named axis that tensor parallelism divides; it divides the bias only if it is the output axis.
        bias: whether there is a bias.
    """
    out = weight.split()[0]
    rows = [Row(f"{native}.weight", (f"{theirs}.weight",), copy(weight), split)]
    if bias:
        rows.append(Row(f"{native}.bias", (f"{theirs}.bias",), copy(out), split if out == split else None))
    return rows


def each_expert(native: str, theirs: tuple[str, ...], one: Op, experts: int) -> Row:
    """Return the row of a parameter of all experts whose tensors are stored one by one.

    Args:
        native: its name.
        theirs: names of one expert's tensors, one for each source of `one`, with `{x}` for its index.
        one: the operation of one expert.
        experts: the number of experts.
    """
    names = tuple(name.replace(EXPERT, str(index)) for index in range(experts) for name in theirs)
    return Row(native, names, Spread(one, "x", experts), "x")


def separate_qkv(native: str, q: str, k: str, v: str, *, bias: bool) -> list[Row]:
    """Return the rows of queries, and of keys and values, from three projections, named without `.weight`."""
    rows = []
    for part, inputs in (("weight", " h"), ("bias", "")) if bias else (("weight", " h"),):
        q_op, kv_op = copy(f"(n d){inputs}"), Op((f"(k d){inputs}",) * 2, f"(k * d){inputs}")
        rows.append(Row(f"{native}.q_{part}", (f"{q}.{part}",), q_op, "n"))
        rows.append(Row(f"{native}.kv_{part}", (f"{k}.{part}", f"{v}.{part}"), kv_op, "k"))
    return rows


def fused_gated(native: str, theirs: str, width: str = "f", *, bias: bool = False) -> list[Row]:
    """Return the rows of a gate and an up projection that are one fused projection, the gate first.

    Args:
        native, theirs: names without `.weight` or `.bias`.
        width: the axis of its inner features.
        bias: whether there is a bias.
    """
    rows = []
    for part, inputs in (("weight", " h"), ("bias", "")) if bias else (("weight", " h"),):
        pattern = f"([{width}|{width}]){inputs}"
        op = Op((FusedPiece(pattern, 0), FusedPiece(pattern, 1)), f"* {width}{inputs}")
        rows.append(Row(f"{native}.{part}", (f"{theirs}.{part}",) * 2, op, width))
    return rows


def fused_qkv(native: str, theirs: str, layout: str, *, bias: bool, inputs_first: bool = False) -> list[Row]:
    """Return the rows of queries, and of keys and values, from one fused projection.

    Args:
        native, theirs: names without `.weight` or `.bias`.
        layout: order of the output features of queries, keys and values, such as "(k [g|1|1] d)".
        bias: whether there is a bias.
        inputs_first: the weight is stored as [in, out].
    """
    queries = re.sub(r"\[([^|]*)\|.*\]", r"\1", layout)
    patterns = {"weight": f"h {layout}" if inputs_first else f"{layout} h", "bias": layout}
    rows = []
    for part, inputs in (("weight", " h"), ("bias", "")) if bias else (("weight", " h"),):
        name, pattern = f"{theirs}.{part}", patterns[part]
        q_op = Op((FusedPiece(pattern, 0),), queries + inputs)
        kv_op = Op((FusedPiece(pattern, 1), FusedPiece(pattern, 2)), f"(k * d){inputs}")
        rows.append(Row(f"{native}.q_{part}", (name,), q_op, q_op.native_axes[0]))
        rows.append(Row(f"{native}.kv_{part}", (name, name), kv_op, "k"))
    return rows
