"""Words of Hugging Face configs in our terms: activations, rotary frequencies, sliding windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.layers.rotary import RotaryConfig

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
        raise ConversionError(f"{field_name}={value!r} is not supported; supported: {supported}")
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
        ConversionError: a rope type, or a field of one, that is missing or not supported.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ConversionError(f"rope_type={kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}")
    for name, value in parameters.items():
        harmless = name == "type" or (name == "partial_rotary_factor" and value in (None, 1.0))
        if name not in ROPE_KEYS[kind] and not harmless:
            raise ConversionError(f"rope_parameters.{name}={value!r} is not supported with rope_type={kind!r}")
    numbers = {name: parameters.get(name) for name in sorted(ROPE_KEYS[kind] - {"rope_type"})}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConversionError(f"rope_parameters.{name}={value!r} must be a number above 0 with rope_type={kind!r}")
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


def layer_windows(layer_types: Sequence[str], sliding_window: int | None) -> tuple[int | None, ...]:
    """transformers' `layer_types` -> how many last keys a query sees in each layer; None = all.

    Raises:
        ConversionError: a kind of layer that is not supported, or a sliding one without a window.
    """
    for layer, kind in enumerate(layer_types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConversionError(
                f"layer_types[{layer}]={kind!r} is not supported; supported: full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and sliding_window is None:
            raise ConversionError(
                f"layer_types[{layer}]={kind!r} needs sliding_window, and use_sliding_window=true where the family "
                "has that field"
            )
    return tuple(sliding_window if kind == "sliding_attention" else None for kind in layer_types)
