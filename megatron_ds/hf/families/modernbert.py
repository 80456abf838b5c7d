"""ModernBERT (Warner et al. 2024): rotations instead of positions, windows on both sides, norms at the inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, layer_windows, quotient, ropes_by_kind
from megatron_ds.hf.families.bert import encoder, head_of, masked_lm_classes
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_gated, fused_qkv, linear, norm
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.bert import EncoderConfig

SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
BIASES = {"attention_bias", "mlp_bias", "norm_bias", "decoder_bias", "classifier_bias"}
ROPES = {
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "global_rope_theta",
    "local_rope_theta",
    "max_position_embeddings",
}
LAYERS = {"layer_types", "local_attention", "global_attn_every_n_layers"}
DROPOUTS = {"attention_dropout", "embedding_dropout", "mlp_dropout"}
OTHERS = {"hidden_activation", "classifier_activation", "norm_eps", "initializer_range", "pad_token_id"}
FIELDS = FieldRules(
    mapped=frozenset(SIZES | BIASES | ROPES | LAYERS | DROPOUTS | OTHERS | {"tie_word_embeddings"}),
    equal={"sparse_prediction": (False,)},
    training=frozenset({"initializer_cutoff_factor"}),
    cosmetic=frozenset(
        [
            "classifier_pooling",
            "cls_token_id",
            "deterministic_flash_attn",
            "reference_compile",
            "repad_logits_with_grad",
            "sparse_pred_ignore_index",
        ]
    ),
)


def translate(config: Any) -> EncoderConfig:
    """Translate a ModernBertConfig. A query sees as many keys on each side as half of `local_attention`, and itself."""
    every = getattr(config, "global_attn_every_n_layers", None)
    if every is not None and config.layer_types != _layer_types(config.num_hidden_layers, every):
        raise ConversionError(f"global_attn_every_n_layers={every} contradicts layer_types={config.layer_types}")
    return encoder(
        config,
        tied=config.tie_word_embeddings,
        ffn_size=config.intermediate_size,
        norm=NormStyle("layer", config.norm_eps, bias=config.norm_bias),
        first_norm=False,
        final_norm=True,
        rotary=ropes_by_kind(config, quotient(config, "hidden_size", "num_attention_heads"), fp32=True, rounded=True),
        windows=layer_windows(config.layer_types, config.local_attention // 2 + 1),
        qkv_bias=config.attention_bias,
        attention_out_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        activation=activation("hidden_activation", config.hidden_activation),
        gated=True,
        scaled_residual_init=True,
        head_activation=activation("classifier_activation", config.classifier_activation),
        head_transform_bias=config.classifier_bias,
        head_bias=config.decoder_bias,
        attention_dropout=config.attention_dropout,
        attention_out_dropout=config.attention_dropout,
        ffn_dropout=config.mlp_dropout,
        embedding_dropout=config.embedding_dropout,
    )


def _layer_types(num_layers: int, every: int) -> list[str]:
    """Return the kinds of layers of a model with full attention in each layer whose index `every` divides."""
    return ["sliding_attention" if layer % every else "full_attention" for layer in range(num_layers)]


def _every(config: EncoderConfig) -> dict[str, Any]:
    """Return the field that transformers 4 reads instead of `layer_types`, if it can say the same."""
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    numbers = range(1, config.num_layers + 1)
    found = [every for every in numbers if _layer_types(config.num_layers, every) == kinds]
    return {"global_attn_every_n_layers": found[0]} if found else {}


def rows(config: EncoderConfig) -> list[Row]:
    """Return the table. The first block has no norm at attention's input."""
    prefix = "model." if config.masked_lm else ""  # transformers writes a model without a head so
    native, theirs = "blocks.{n}", f"{prefix}layers.{{n}}"
    later = tuple(range(1, config.num_layers))
    table = [
        Row(EMBEDDING, (f"{prefix}embeddings.tok_embeddings.weight",), copy("v e"), "v"),
        *norm("entry.norm", f"{prefix}embeddings.norm", config.norm, "e"),
        *fused_qkv(f"{native}.attention.qkv", f"{theirs}.attn.Wqkv", "([n|k|k] d)", bias=config.qkv_bias),
        *linear(f"{native}.attention.out", f"{theirs}.attn.Wo", "h (n d)", "n", bias=config.attention_out_bias),
        *(replace(row, layers=later) for row in norm(f"{native}.attention_norm", f"{theirs}.attn_norm", config.norm)),
        *norm(f"{native}.mlp_norm", f"{theirs}.mlp_norm", config.norm),
        *fused_gated(f"{native}.mlp.up", f"{theirs}.mlp.Wi", bias=config.mlp_bias),
        *linear(f"{native}.mlp.down", f"{theirs}.mlp.Wo", "h f", "f", bias=config.mlp_bias),
        *norm("exit.norm", f"{prefix}final_norm", config.norm),
    ]
    if not config.masked_lm:
        return table
    table += linear("head.transform", "head.dense", "e h", None, bias=config.head_transform_bias)
    table += norm("head.norm", "head.norm", config.norm, "e")
    if config.head_bias:
        table.append(Row("head.bias", ("decoder.bias",), copy("v"), "v"))
    return [*table, Row(HEAD, ("decoder.weight",), copy("v e"), "v")]


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    prefix="model.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    classes=masked_lm_classes("ModernBert"),
    detect_heads=head_of("head.dense.weight"),
    config_overrides=_every,
    old_rope_names={
        "rope_theta": "global_rope_theta",
        "rope_local_base_freq": "local_rope_theta",
        "rope_scaling": None,  # it would be read for both kinds of layers
    },
)

FAMILIES = (MODERNBERT,)
