"""What a family is: a table of rows, the meaning of its config fields, and a translation of its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.mapping import Op
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.config import DecoderConfig

LAYER = "{n}"


@dataclass(frozen=True)
class Row:
    """One native parameter and the Hugging Face tensors that it is made of; `{n}` stands for the layer.

    Attributes:
        native: name in our model.
        names: names on disk, one a source of `op`.
        op: the bijection between them.
        split: the named axis that tensor parallelism divides; None = replicated.
    """

    native: str
    names: tuple[str, ...]
    op: Op
    split: str | None = None

    def at(self, layer: int) -> Row:
        """The row of one layer."""
        number = str(layer)
        names = tuple(name.replace(LAYER, number) for name in self.names)
        return Row(self.native.replace(LAYER, number), names, self.op, self.split)


@dataclass(frozen=True)
class FieldRules:
    """Every config field that a family may carry, by what it does to the math.

    Attributes:
        mapped: read by `translate`.
        equal: fields that change the math and of which one value is supported.
        harmless: no effect on training: token ids, outputs, caching, names.
    """

    mapped: frozenset[str]
    equal: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()

    def check(self, raw: Mapping[str, Any], where: str) -> None:
        """Refuse fields that are unknown, or known and not supported at their value.

        Raises:
            ConversionError: naming field, value and what is supported.
        """
        for name, value in raw.items():
            if name in self.equal:
                if value != self.equal[name]:
                    wanted = self.equal[name]
                    raise ConversionError(f"{where}: {name}={value!r} is not supported; supported: {wanted!r}")
            elif name not in self.mapped and name not in self.harmless and name not in COMMON_HARMLESS:
                raise ConversionError(
                    f"{where}: {name}={value!r} is a field that this family does not have; what it would do to the "
                    f"math is not known, so it is refused; remove it if it does nothing"
                )


COMMON_HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    ]
)


@dataclass(frozen=True)
class Family:
    """One Hugging Face `model_type`.

    Attributes:
        model_type, architecture: as in config.json.
        prefix: what base-model saves leave out of tensor names.
        fields: the ledger of its config fields.
        translate: its config (defaults filled in by transformers) -> ours.
        rows: our config -> its table.
        ignored: regular expressions of tensors on disk that are buffers, not weights.
    """

    model_type: str
    architecture: str
    prefix: str
    fields: FieldRules
    translate: Callable[[Any], DecoderConfig]
    rows: Callable[[DecoderConfig], list[Row]]
    ignored: tuple[str, ...] = ()


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Sizes of the named axes in all tables: v vocabulary, h hidden, f feed-forward, p positions, k key/value heads,
    g query heads a group, d head dim, c the three of Q, K and V."""
    return {
        "v": config.vocab_size,
        "h": config.hidden_size,
        "f": config.ffn_size,
        "p": config.max_positions,
        "k": config.num_kv_heads,
        "g": config.num_heads // config.num_kv_heads,
        "d": config.head_dim,
        "c": 3,
    }


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(field_name: str, value: str) -> str:
    """Our name of an activation.

    Raises:
        ConversionError: one that is not supported.
    """
    if value not in ACTIVATION_NAMES:
        supported = ", ".join(sorted(ACTIVATION_NAMES))
        raise ConversionError(f"config.json: {field_name}={value!r} is not supported; supported: {supported}")
    return ACTIVATION_NAMES[value]


ROPE_KEYS = {
    "default": frozenset({"rope_theta", "rope_type"}),
    "linear": frozenset({"rope_theta", "rope_type", "factor"}),
    "llama3": frozenset(
        ["rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    ),
}


def rotary(parameters: Mapping[str, Any], head_dim: int) -> RotaryConfig:
    """transformers' `rope_parameters` -> ours.

    Raises:
        ConversionError: a rope type, or a field of one, that is not supported.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        supported = ", ".join(ROPE_KEYS)
        raise ConversionError(f"config.json: rope_type={kind!r} is not supported; supported: {supported}")
    for name, value in parameters.items():
        harmless = name == "type" or (name == "partial_rotary_factor" and value in (None, 1.0))
        if name not in ROPE_KEYS[kind] and not harmless:
            raise ConversionError(f"config.json: rope_parameters.{name}={value!r} is not supported with {kind!r} rope")
    if kind == "llama3":
        return RotaryConfig(
            head_dim,
            float(parameters["rope_theta"]),
            kind,
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
    return RotaryConfig(head_dim, float(parameters["rope_theta"]), kind, factor=float(parameters.get("factor", 1.0)))
