"""EuroBERT (Boizard et al. 2025): Llama without causality, and logits without a transformation before them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, quotient, rotary
from megatron_ds.hf.families.bert import encoder, masked_lm_classes
from megatron_ds.hf.families.llama import BUFFERS, RMS_FIELDS, biases
from megatron_ds.hf.families.llama import rows as llama_rows
from megatron_ds.hf.family import HEAD, Family, Row
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.bert import EncoderConfig

FIELDS = FieldRules(
    mapped=RMS_FIELDS | {"attention_bias", "mlp_bias"},
    cosmetic=frozenset({"classifier_pooling", "clf_pooling", "mask_token_id"}),
)


def translate(config: Any) -> EncoderConfig:
    """Translate a EuroBertConfig. The bias of the logits goes by `mlp_bias`, and attention has all or none."""
    quotient(config, "num_attention_heads", "num_key_value_heads")
    rope = rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)
    return encoder(
        config,
        **biases(config, mlp=True),
        tied=config.tie_word_embeddings,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn_size=config.intermediate_size,
        norm=NormStyle("rms", config.rms_norm_eps),
        embedding_norm=False,
        final_norm=True,
        rotary=(rope,) * config.num_hidden_layers,
        activation=activation("hidden_act", config.hidden_act),
        gated=True,
        head_activation=None,
        head_bias=config.mlp_bias,
        attention_dropout=config.attention_dropout,
    )


def rows(config: EncoderConfig) -> list[Row]:
    """Return Llama's table with the bias of the logits; of a base model without its prefix and without a head."""
    shared: Any = config  # Llama's table reads the options of its blocks alone
    table = llama_rows(shared)
    if config.masked_lm:
        return table + [Row("head.bias", ("lm_head.bias",), copy("v"), "v")] * config.head_bias
    without = [row for row in table if row.native != HEAD]
    return [replace(row, names=tuple(name.removeprefix("model.") for name in row.names)) for row in without]


EUROBERT = Family(
    model_type="eurobert",
    architecture="EuroBertForMaskedLM",
    prefix="model.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=BUFFERS,
    classes=masked_lm_classes("EuroBert"),
)

FAMILIES = (EUROBERT,)
