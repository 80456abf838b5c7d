"""GPT-OSS: attention with sinks, clamped experts with biases, inputs before outputs in fused tensors of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import layer_windows
from megatron_ds.hf.families.experts import AUX_LOSS, MLP, ROUTING, aux_loss, eager_experts, router, with_experts
from megatron_ds.hf.families.llama import NATIVE, RMS_FIELDS, THEIRS, attention_rows, decoder, family, outer_rows, rms
from megatron_ds.hf.family import Row, linear
from megatron_ds.hf.tensor_mapping import FusedPiece, Op, copy
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.stack import MoEConfig

EXPERTS = f"{THEIRS}.mlp.experts"
GATE_UP = "x h (m [1|1])"  # a gate, an up, the next gate
GATE_UP_BIAS = "x (m [1|1])"
ALPHA = 1.702


def translate(config: Any) -> DecoderConfig:
    """Translate a GptOssConfig. Experts compute down((up + 1) * gate * sigmoid(1.702 gate)) of clamped gate and up."""
    if config.swiglu_limit is None:
        raise ConversionError("swiglu_limit=None is not supported; supported: a number above 0")
    dense = decoder(
        config,
        rms(config, fp32_weight=True),
        activation="gelu_sigmoid",
        windows=layer_windows(config.layer_types, config.sliding_window),
        qkv_bias=config.attention_bias,
        attention_out_bias=config.attention_bias,
        attention_sinks=True,
    )
    moe = MoEConfig(
        router=router(config, "num_local_experts", score="softmax_of_chosen", bias=True),
        ffn_size=config.intermediate_size,
        layers=tuple(range(config.num_hidden_layers)),
        limit=float(config.swiglu_limit),
        bias=True,
        aux_loss=aux_loss(config),
    )
    return with_experts(dense, moe)


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `model.` is the base model's prefix."""

    def gate_up(pattern: str) -> tuple[FusedPiece, FusedPiece]:
        return FusedPiece(pattern, 0), FusedPiece(pattern, 1)

    weight, bias = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.gate_up_proj_bias"
    return [
        *outer_rows(config),
        *attention_rows(config),
        Row(f"{NATIVE}.attention.sinks", (f"{THEIRS}.self_attn.sinks",), copy("n"), "n"),
        *linear(f"{MLP}.router", f"{THEIRS}.mlp.router", "x h", None, bias=True),
        Row(f"{MLP}.experts.up_weight", (weight,) * 2, Op(gate_up(GATE_UP), "x * m h"), "x"),
        Row(f"{MLP}.experts.up_bias", (bias,) * 2, Op(gate_up(GATE_UP_BIAS), "x * m"), "x"),
        Row(f"{MLP}.experts.down_weight", (f"{EXPERTS}.down_proj",), Op(("x m h",), "x h m"), "x"),
        Row(f"{MLP}.experts.down_bias", (f"{EXPERTS}.down_proj_bias",), copy("x h"), "x"),
    ]


GPT_OSS = replace(
    family(
        "gpt_oss",
        "GptOssForCausalLM",
        translate,
        FieldRules(
            RMS_FIELDS - {"hidden_act"}
            | ROUTING
            | AUX_LOSS
            | {"num_local_experts", "num_experts", "attention_bias", "sliding_window", "layer_types", "swiglu_limit"},
            # experts have an activation of their own; transformers reads neither field but swiglu_alpha
            equal={"hidden_act": ("silu",), "swiglu_alpha": (ALPHA,)},
        ),
        rows,
    ),
    load_options=eager_experts,
)

FAMILIES = (GPT_OSS,)
