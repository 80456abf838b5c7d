"""Translation of fields that many Hugging Face configs share: activations, head sizes, windows, rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.layers.rotary import RotaryConfig

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
}


def activation(field_name: str, value: str) -> str:
    """Return the name in `layers.mlp.ACTIVATIONS` of a Hugging Face activation.

    Raises:
        ConversionError: the activation is not supported.
    """
    if value not in ACTIVATION_NAMES:
        supported = ", ".join(sorted(ACTIVATION_NAMES))
        raise ConversionError(f"{field_name}={value!r} is not supported; supported: {supported}")
    return ACTIVATION_NAMES[value]


def quotient(config: Any, total: str, parts: str) -> int:
    """Divide one field by another, such as the hidden size by the number of heads.

    Raises:
        ConversionError: the division leaves a remainder, or the field is missing.
    """
    dividend, divisor = getattr(config, total), getattr(config, parts)
    if divisor is None:
        raise ConversionError(f"{parts} is missing, which {total}={dividend} is divided by; nearest: {dividend}")
    if dividend % divisor:
        fitting = [number for number in range(1, dividend + 1) if dividend % number == 0]
        below = max(number for number in fitting if number < divisor or number == 1)
        above = min((number for number in fitting if number > divisor), default=below)
        nearest = " or ".join(str(number) for number in dict.fromkeys((below, above)))
        raise ConversionError(f"{parts}={divisor} does not divide {total}={dividend}; nearest: {nearest}")
    return dividend // divisor


def head_size(config: Any) -> int:
    """Return the dims of a head: `head_dim` where a config has it, else the quotient of hidden size and heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def padding_id(config: Any) -> int | None:
    """Return `pad_token_id`, for families whose embedding gets no gradient at it; a negative id counts from the end.

    Raises:
        ConversionError: the id is not in the vocabulary.
    """
    given, size = config.pad_token_id, config.vocab_size
    if given is not None and not -size <= given < size:
        raise ConversionError(f"pad_token_id={given} must be below vocab_size={size}, or null")
    return given if given is None else given % size


KINDS = ("full_attention", "sliding_attention")  # of layers


def layer_windows(layer_types: Sequence[str], sliding_window: int | None) -> tuple[int | None, ...]:
    """Translate `layer_types` into the number of last keys that a query sees in each layer; None = all.

    Raises:
        ConversionError: a kind of layer is not supported, or a sliding one has no window.
    """
    for layer, kind in enumerate(layer_types):
        if kind not in KINDS:
            raise ConversionError(f"layer_types[{layer}]={kind!r} is not supported; supported: {', '.join(KINDS)}")
        if kind == "sliding_attention" and sliding_window is None:
            raise ConversionError(
                f"layer_types[{layer}]={kind!r} needs sliding_window, and use_sliding_window=true where the family "
                "has that field"
            )
    return tuple(sliding_window if kind == "sliding_attention" else None for kind in layer_types)


_ROPE_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_ROPE_MAY_HAVE: dict[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}


def rotary(
    parameters: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    *,
    partial: bool = False,
    path: str = "rope_parameters",
) -> RotaryConfig:
    """Translate `rope_parameters`, filled in by transformers' config class.

    Args:
        parameters: of all layers, or of one kind of layer.
        head_dim: size of a head.
        max_positions: `max_position_embeddings`.
        partial: whether transformers' code of the family can rotate a part of each head.
        path: name of the field that holds the parameters, for messages.

    Raises:
        ConversionError: a rope type, or one of its fields, is missing, out of range or not supported.
    """
    kind = parameters.get("rope_type", "default")
    _check_rope_fields(parameters, kind, path)
    plain = RotaryConfig(_rotated_dims(parameters, head_dim, partial, path), float(parameters["rope_theta"]))
    if kind == "default":
        return plain
    original = parameters.get("original_max_position_embeddings", max_positions)
    factor = float(parameters.get("factor") or max_positions / original)
    scaled = replace(plain, factor=factor, original_max_positions=original)
    if kind == "llama3":
        return _llama3(parameters, scaled, path)
    if kind == "yarn":
        return _yarn(parameters, scaled, path)
    if kind == "longrope":
        return _longrope(parameters, scaled, path)
    if kind == "dynamic" and plain.dim == 2:
        raise ConversionError(f"{path}.rope_type={kind!r} needs more than 2 rotated dims a head; nearest: 4")
    return replace(scaled, scaling=kind)


def every_rope(config: Any, *, partial: bool = False, **changes: Any) -> tuple[RotaryConfig, ...]:
    """Translate `rope_parameters` into the same rotation of all layers.

    Args:
        config: transformers' config object.
        partial: see `rotary`.
        changes: other fields of `RotaryConfig`, such as `adjacent`.

    Raises:
        ConversionError: see `rotary`.
    """
    rope = rotary(config.rope_parameters, head_size(config), config.max_position_embeddings, partial=partial)
    return (replace(rope, **changes),) * config.num_hidden_layers


def ropes_by_kind(config: Any, head_dim: int | None = None, **changes: Any) -> tuple[RotaryConfig, ...]:
    """Translate `rope_parameters` that hold one mapping for each kind of layer into the rotation of each layer.

    Args:
        config: transformers' config object.
        head_dim: size of a head; None = `head_size` of the config.
        changes: other fields of `RotaryConfig`.

    Raises:
        ConversionError: see `rotary`.
    """
    extra = config.rope_parameters.keys() - set(KINDS)
    if extra:
        raise ConversionError(
            f"rope_parameters.{min(extra)} is next to {' and '.join(KINDS)}; it must be in one of them"
        )
    ropes = {
        kind: replace(_rope_of(config, kind, head_dim or head_size(config)), **changes)
        for kind in set(config.layer_types)
    }
    return tuple(ropes[kind] for kind in config.layer_types)


def _rope_of(config: Any, kind: str, head_dim: int) -> RotaryConfig:
    parameters, path = config.rope_parameters[kind], f"rope_parameters.{kind}"
    if not parameters.get("truncate", True):
        raise ConversionError(f"{path}.truncate=False is not read by transformers here; supported: True")
    return rotary(parameters, head_dim, config.max_position_embeddings, path=path)


def _check_rope_fields(parameters: Mapping[str, Any], kind: str, path: str) -> None:
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise ConversionError(f"{path}.rope_type={kind!r} is not supported; supported: {', '.join(_ROPE_NEEDS)}")
    known = {*_ROPE_ALWAYS, *_ROPE_NEEDS[kind], *_ROPE_MAY_HAVE.get(kind, ())}
    for name, value in parameters.items():
        if name not in known:
            raise ConversionError(f"{path}.{name}={value!r} is not supported with rope_type={kind!r}")
    for name in ("rope_theta", *_ROPE_NEEDS[kind]):
        if parameters.get(name) is None:
            raise ConversionError(f"{path}.{name} is missing, which rope_type={kind!r} needs")


def _rotated_dims(parameters: Mapping[str, Any], head_dim: int, partial: bool, path: str) -> int:
    part = parameters.get("partial_rotary_factor")
    part = 1.0 if part is None else part
    if part != 1.0 and not partial:
        raise ConversionError(f"{path}.partial_rotary_factor={part} is not supported by this family; supported: 1.0")
    dim = int(head_dim * part)
    if part > 1.0 or dim < 2 or dim % 2:
        raise ConversionError(
            f"{path}.partial_rotary_factor={part} rotates {dim} of head_dim={head_dim}; it must be an even number "
            f"from 2 to {head_dim}"
        )
    return dim


def _llama3(parameters: Mapping[str, Any], scaled: RotaryConfig, path: str) -> RotaryConfig:
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    if high <= low:
        raise ConversionError(f"{path}.high_freq_factor={high} must be above low_freq_factor={low}")
    return replace(scaled, scaling="llama3", low_freq_factor=low, high_freq_factor=high)


def _yarn(parameters: Mapping[str, Any], scaled: RotaryConfig, path: str) -> RotaryConfig:
    fast, slow = float(parameters.get("beta_fast") or 32), float(parameters.get("beta_slow") or 1)
    if fast < slow:
        raise ConversionError(f"{path}.beta_fast={fast} must not be below beta_slow={slow}")
    if scaled.theta <= 1.0:
        raise ConversionError(f"{path}.rope_theta={scaled.theta} must be above 1 with rope_type='yarn'")

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(scaled.factor) + 1.0 if scaled.factor > 1.0 else 1.0

    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
        magnitude = growth(weights[0]) / growth(weights[1]) if weights[0] and weights[1] else growth(1.0)
    truncate = parameters.get("truncate", True)
    scaled = replace(scaled, scaling="yarn", beta_fast=fast, beta_slow=slow, truncate=truncate)
    return replace(scaled, magnitude=float(magnitude))


def _longrope(parameters: Mapping[str, Any], scaled: RotaryConfig, path: str) -> RotaryConfig:
    original = scaled.original_max_positions
    if original < 2:
        raise ConversionError(f"{path}.original_max_position_embeddings={original} must be at least 2 with longrope")
    short, long = (tuple(map(float, parameters[name])) for name in ("short_factor", "long_factor"))
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != scaled.dim // 2:
            raise ConversionError(f"{path}.{name} has {len(factors)} numbers; it must have {scaled.dim // 2}")
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        growth = math.log(scaled.factor) / math.log(original)
        magnitude = math.sqrt(1 + growth) if scaled.factor > 1.0 else 1.0
    return replace(scaled, scaling="longrope", magnitude=float(magnitude), short_factors=short, long_factors=long)
