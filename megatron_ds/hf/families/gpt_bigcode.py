"""StarCoder 1 and SantaCoder: GPT-2 with linear layers, and one key head for all query heads, or one for each."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import quotient
from megatron_ds.hf.families import gpt2
from megatron_ds.hf.family import Family, Row, fused_qkv, linear
from megatron_ds.models.gpt import DecoderConfig

_IN_FP32 = ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
_OF_OLD_CODE = ("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache")
FIELDS = FieldRules(
    mapped=gpt2.FIELDS.mapped - {"scale_attn_by_inverse_layer_idx"} | {"multi_query", "num_key_value_heads"},
    equal=dict.fromkeys(_IN_FP32, (True,)),
    training=gpt2.FIELDS.training,
    cosmetic=gpt2.FIELDS.cosmetic - {"n_ctx", "predict_special_tokens"} | {*_OF_OLD_CODE, "validate_runner_input"},
)


def translate(config: Any) -> DecoderConfig:
    """Translate a GPTBigCodeConfig."""
    kv_heads = 1 if config.multi_query else config.n_head
    if config.num_key_value_heads != kv_heads:
        raise ConversionError(
            f"num_key_value_heads={config.num_key_value_heads} contradicts multi_query={config.multi_query}; nearest: "
            f"{kv_heads}"
        )
    return gpt2.decoder(
        config,
        num_kv_heads=kv_heads,
        head_dim=quotient(config, "n_embd", "n_head"),
        ffn_size=config.n_inner or 4 * config.n_embd,
        attention_scale=None if config.scale_attn_weights else 1.0,
        scaled_residual_init=True,
        **gpt2.dropouts(config),
    )


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `transformer.` is the base model's prefix."""
    layout = "([n|k|k] d)" if config.num_kv_heads == 1 else "(k [1|1|1] d)"
    attention = f"{gpt2.THEIRS}.attn"
    return [
        *gpt2.linear_rows(config),
        *fused_qkv(f"{gpt2.NATIVE}.attention.qkv", f"{attention}.c_attn", layout, bias=True),
        *linear(f"{gpt2.NATIVE}.attention.out", f"{attention}.c_proj", "h (n d)", "n", bias=True),
    ]


GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    prefix="transformer.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^(transformer\.)?(h\.\d+\.attn\.)?(masked_)?bias$",),
    always_named=True,
)

FAMILIES = (GPT_BIGCODE,)
