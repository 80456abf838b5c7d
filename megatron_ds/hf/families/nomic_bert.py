"""Nomic BERT (Nussbaum et al. 2024): BERT with rotations instead of positions, SwiGLU, and no biases in its blocks.

On the hub its projections of queries, keys and values are one tensor, which transformers splits in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import rotary
from megatron_ds.hf.families.bert import EQUAL, MAPPED, bert_options, encoder, head_of, masked_lm_classes
from megatron_ds.hf.families.llama import ROPE_FIELDS
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_qkv, linear, norm, renamed, separate_qkv
from megatron_ds.hf.tensor_mapping import Op, copy
from megatron_ds.models.bert import EncoderConfig

# Fields on the hub that transformers does not read, at the only value that it computes.
HUB_VALUES: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    **dict.fromkeys(["causal", "mlp_fc1_bias", "mlp_fc2_bias", "parallel_block", "prenorm", "qkv_proj_bias"], (False,)),
    **dict.fromkeys(["rotary_emb_interleaved", "use_rms_norm"], (False,)),
    "rotary_emb_fraction": (1.0,),
    **dict.fromkeys(["rotary_emb_scale_base", "rotary_scaling_factor"], (None,)),
}
FIELDS = FieldRules(
    mapped=MAPPED | ROPE_FIELDS | {"head_dim"},
    equal=HUB_VALUES | {"tie_word_embeddings": EQUAL["tie_word_embeddings"]},
)
IN_MEMORY = {
    "emb_ln": "embeddings.LayerNorm",
    "encoder.layers": "layers",
    "attn.out_proj": "self_attn.o_proj",
    "mlp.fc11": "mlp.up_proj",
    "mlp.fc12": "mlp.gate_proj",
    "mlp.fc2": "mlp.down_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
    **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
}


def translate(config: Any) -> EncoderConfig:
    """Translate a NomicBertConfig."""
    rope = rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)
    options = {
        "head_dim": config.head_dim,
        "positions": None,
        "rotary": (rope,) * config.num_hidden_layers,
        "gated": True,
        "pooler": False,
        **dict.fromkeys(["qkv_bias", "attention_out_bias", "mlp_bias"], False),
    }
    return encoder(config, **bert_options(config) | options)


def _table(qkv: Callable[[str, str], list[Row]]) -> Callable[[EncoderConfig], list[Row]]:
    """Return a table; `qkv` has the rows of queries, keys and values from their name and that of attention."""

    def rows(config: EncoderConfig) -> list[Row]:
        prefix = "nomic_bert." if config.masked_lm else ""  # transformers writes a model without a head so
        native, theirs = "blocks.{n}", f"{prefix}encoder.layers.{{n}}"
        gate_up = f"{theirs}.mlp.fc12.weight", f"{theirs}.mlp.fc11.weight"
        table = [
            Row(EMBEDDING, (f"{prefix}embeddings.word_embeddings.weight",), copy("v e"), "v"),
            Row("entry.token_types.weight", (f"{prefix}embeddings.token_type_embeddings.weight",), copy("s e")),
            *norm("entry.norm", f"{prefix}emb_ln", config.norm, "e"),
            *qkv(f"{native}.attention.qkv", f"{theirs}.attn"),
            *linear(f"{native}.attention.out", f"{theirs}.attn.out_proj", "h (n d)", "n"),
            *norm(f"{native}.attention_output_norm", f"{theirs}.norm1", config.norm),
            Row(f"{native}.mlp.up.weight", gate_up, Op(("f h",) * 2, "* f h"), "f"),
            *linear(f"{native}.mlp.down", f"{theirs}.mlp.fc2", "h f", "f"),
            *norm(f"{native}.mlp_output_norm", f"{theirs}.norm2", config.norm),
        ]
        if config.masked_lm:
            table += linear("head.transform", "cls.predictions.transform.dense", "e h", None, bias=True)
            table += norm("head.norm", "cls.predictions.transform.layer_norm", config.norm, "e")
            table.append(Row("head.bias", ("cls.predictions.bias",), copy("v"), "v"))
            table.append(Row(HEAD, ("cls.predictions.decoder.weight",), copy("v e"), "v"))
        return table

    return rows


def _fused(native: str, theirs: str) -> list[Row]:
    return fused_qkv(native, f"{theirs}.Wqkv", "([n|k|k] d)", bias=False)


def _separate(native: str, theirs: str) -> list[Row]:
    return separate_qkv(native, *(f"{theirs}.{part}_proj" for part in "qkv"), bias=False)


NOMIC_BERT = Family(
    model_type="nomic_bert",
    architecture="NomicBertForMaskedLM",
    prefix="nomic_bert.",
    fields=FIELDS,
    translate=translate,
    rows=_table(_fused),
    ignored=(r"^(nomic_bert\.)?encoder\.layers\.\d+\.attn\.rotary_emb\.inv_freq$",),
    aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    classes=masked_lm_classes("NomicBert"),
    detect_heads=head_of("cls.predictions.transform.dense.weight"),
    other_rows=(renamed(_table(_separate), IN_MEMORY),),
)

FAMILIES = (NOMIC_BERT,)
