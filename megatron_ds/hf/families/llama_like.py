"""Families that are Llama with other options: places of norms, windows, biases, activations, forms of rotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope, head_size, layer_windows, ropes_by_kind
from megatron_ds.hf.families.llama import (
    RMS_FIELDS,
    SHARED_FIELDS,
    biases,
    decoder,
    family,
    rms,
    rows,
    translate_llama,
)
from megatron_ds.hf.family import Family, Row, renamed
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

WINDOWS = frozenset({"sliding_window", "layer_types"})
BIASES = frozenset({"attention_bias", "mlp_bias"})

# A feed-forward layer without a gate: `rows` has StarCoder2's names of its projections.
plain_mlp_rows = renamed(rows, {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"})


def later_family(
    model_type: str,
    architecture: str,
    translate: Callable[[Any], DecoderConfig],
    fields: FieldRules,
    table: Callable[[DecoderConfig], list[Row]] = rows,
) -> Family:
    """Return a family with Llama's prefix and buffers that is younger than `model_type` in config.json."""
    return replace(family(model_type, architecture, translate, fields, table), always_named=True)


def windows(config: Any) -> tuple[int | None, ...]:
    """Translate `layer_types` and `sliding_window`."""
    return layer_windows(config.layer_types, config.sliding_window)


# ---- no other option than Llama's -----------------------------------------------------------------------------------


def _seed_oss(config: Any) -> DecoderConfig:
    return decoder(
        config,
        rms(config),
        qkv_bias=config.attention_bias,
        attention_out_bias=config.attention_out_bias,
        mlp_bias=config.mlp_bias,
        residual_dropout=config.residual_dropout,
    )


def _ministral(config: Any) -> DecoderConfig:
    return decoder(config, rms(config), windows=windows(config))


def _cwm(config: Any) -> DecoderConfig:
    return decoder(config, rms(config), windows=windows(config), mlp_bias=config.mlp_bias)


INTERNLM3 = later_family(
    "internlm3", "LlamaForCausalLM", translate_llama, FieldRules(RMS_FIELDS | BIASES | {"qkv_bias", "bias"})
)
IQUESTCODER = later_family(
    "iquestcoder",
    "LlamaForCausalLM",
    translate_llama,
    FieldRules(RMS_FIELDS | BIASES, equal={"clip_qkv": (None,), "use_sliding_window": (False,)}),
)
SEED_OSS = later_family(
    "seed_oss",
    "SeedOssForCausalLM",
    _seed_oss,
    FieldRules(RMS_FIELDS | BIASES | {"attention_out_bias", "residual_dropout"}),
)
MINISTRAL = later_family("ministral", "MinistralForCausalLM", _ministral, FieldRules(RMS_FIELDS | WINDOWS))
CWM = later_family("cwm", "CwmForCausalLM", _cwm, FieldRules(RMS_FIELDS | WINDOWS | {"mlp_bias"}))


# ---- a plain MLP -----------------------------------------------------------------------------------------------------


def _arcee(config: Any) -> DecoderConfig:
    return decoder(config, rms(config), gated=False, **biases(config, mlp=True))


def _jais2(config: Any) -> DecoderConfig:
    return decoder(config, NormStyle("layer", config.layer_norm_eps), gated=False, **biases(config, mlp=True))


ARCEE = later_family("arcee", "ArceeForCausalLM", _arcee, FieldRules(RMS_FIELDS | BIASES), plain_mlp_rows)
JAIS2 = later_family(
    "jais2",
    "Jais2ForCausalLM",
    _jais2,
    FieldRules(SHARED_FIELDS | BIASES | {"layer_norm_eps", "hidden_act"}),
    plain_mlp_rows,
)


# ---- pairs of adjacent dims are rotated -----------------------------------------------------------------------------


def _ernie4_5(config: Any) -> DecoderConfig:
    bias = bool(config.use_bias)
    return decoder(
        config,
        rms(config),
        rotary=every_rope(config, adjacent=True, fp32=True),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        attention_dropout=0.0,
    )


def _helium(config: Any) -> DecoderConfig:
    if config.num_attention_heads * head_size(config) != config.hidden_size:
        raise ConversionError(
            f"head_dim={head_size(config)} times num_attention_heads={config.num_attention_heads} is not "
            f"hidden_size={config.hidden_size}, which the output projection of transformers takes; nearest: "
            f"head_dim={config.hidden_size // config.num_attention_heads}"
        )
    return decoder(
        config,
        rms(config, fp32_weight=True),
        rotary=every_rope(config, adjacent=True),
        qkv_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


ERNIE4_5 = later_family(
    "ernie4_5", "Ernie4_5ForCausalLM", _ernie4_5, FieldRules(RMS_FIELDS - {"attention_dropout"} | {"use_bias"})
)
HELIUM = later_family("helium", "HeliumForCausalLM", _helium, FieldRules(RMS_FIELDS | BIASES))


# ---- norms at the outputs of attention and MLP, windows in some layers ----------------------------------------------


def _olmo3(config: Any) -> DecoderConfig:
    style = rms(config, fp32_weight=True)
    return decoder(
        config,
        style,
        norm_place="output",
        qk_norm=style,
        qk_norm_across_heads=True,
        rotary=ropes_by_kind(config, fp32=True),
        windows=windows(config),
        **biases(config),
    )


_OLMO3_THETA = 500000.0


def _olmo3_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a `rope_theta` that transformers 5 takes for the full layers alone; transformers 4 took it for all."""
    theta, ropes = raw.get("rope_theta"), raw.get("rope_parameters")
    sliding = ropes.get("sliding_attention") if isinstance(ropes, Mapping) else None
    of_its_own = isinstance(sliding, Mapping) and "rope_theta" in sliding
    if theta is not None and theta != _OLMO3_THETA and not of_its_own:
        raise ConversionError(
            f"rope_theta={theta!r} reaches the full layers alone in transformers 5, and all layers in transformers 4; "
            "try rope_parameters with a rope_theta in full_attention and in sliding_attention"
        )
    return dict(raw)


def _exaone4(config: Any) -> DecoderConfig:
    """Full layers are not rotated where there are windows at all."""
    rotated = [kind == "sliding_attention" or config.sliding_window is None for kind in config.layer_types]
    ropes = every_rope(config)
    return decoder(
        config,
        rms(config),
        norm_place="output",
        qk_norm=rms(config),
        rotary=tuple(rope if on else None for rope, on in zip(ropes, rotated)),
        windows=windows(config),
    )


def _exaone4_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Add the `layer_types` of a model without windows, and count the layers of a pattern such as "LLLG".

    The config class of transformers divides by a pattern that is 0 or a text.
    """
    from transformers import AutoConfig

    found, pattern, given = dict(raw), raw.get("sliding_window_pattern"), raw.get("layer_types")
    if isinstance(pattern, str):
        if given is None and pattern != "L" * (len(pattern) - 1) + "G":
            raise ConversionError(
                f"sliding_window_pattern={pattern!r} is not supported without layer_types; try to add them"
            )
        found["sliding_window_pattern"] = len(pattern)
    if given is None and raw.get("sliding_window", 0) is None:
        layers = raw.get("num_hidden_layers", AutoConfig.for_model("exaone4").num_hidden_layers)
        found.update({"layer_types": ["full_attention"] * layers} if isinstance(layers, int) else {})
    return found


OLMO3 = replace(
    later_family(
        "olmo3",
        "Olmo3ForCausalLM",
        _olmo3,
        FieldRules(RMS_FIELDS - {"partial_rotary_factor"} | WINDOWS | {"attention_bias"}),
    ),
    complete_fields=_olmo3_fields,
)
EXAONE4 = replace(
    later_family(
        "exaone4",
        "Exaone4ForCausalLM",
        _exaone4,
        FieldRules(
            RMS_FIELDS | WINDOWS | {"sliding_window_pattern"}, may_be_zero=frozenset({"sliding_window_pattern"})
        ),
    ),
    complete_fields=_exaone4_fields,
)

FAMILIES = (INTERNLM3, IQUESTCODER, SEED_OSS, MINISTRAL, CWM, ARCEE, JAIS2, ERNIE4_5, HELIUM, OLMO3, EXAONE4)
