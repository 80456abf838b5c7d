"""DistilBERT: BERT without segments, without a pooler, and without dropout of attention's output."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, quotient
from megatron_ds.hf.families.bert import POST_NORM, HeadNames, bert_family, bert_rows, encoder, masked_lm_classes
from megatron_ds.hf.family import renamed
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.bert import EncoderConfig

SIZES = {"dim", "hidden_dim", "n_heads", "n_layers", "max_position_embeddings", "vocab_size"}
OTHER_NAMES = {"hidden_size", "num_attention_heads", "num_hidden_layers"}  # of sizes
FIELDS = FieldRules(
    mapped=frozenset(
        SIZES | OTHER_NAMES | {"activation", "dropout", "attention_dropout", "initializer_range", "pad_token_id"}
    ),
    equal={"tie_word_embeddings": (True,)},
    # the positions are trained, whatever they are at first
    cosmetic=frozenset({"sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_"}),
)
NAMES = HeadNames(
    prefix="distilbert.",
    transform="vocab_transform",
    norm="vocab_layer_norm",
    bias="vocab_projector.bias",
    copies=("vocab_projector.weight",),
    pooler=None,
)
BLOCK = {
    "encoder.layer": "transformer.layer",
    **{f"attention.self.{name}": f"attention.{name[0]}_lin" for name in ("query", "key", "value")},
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def translate(config: Any) -> EncoderConfig:
    """Translate a DistilBertConfig. Its norms have a fixed epsilon."""
    act = activation("activation", config.activation)
    return encoder(
        config,
        **POST_NORM,
        head_dim=quotient(config, "dim", "n_heads"),
        ffn_size=config.hidden_dim,
        norm=NormStyle("layer", 1e-12),
        activation=act,
        head_activation=act,
        attention_dropout=config.attention_dropout,
        attention_out_dropout=0.0,
        residual_dropout=config.dropout,
        embedding_dropout=config.dropout,
        positions=PositionTable(config.max_position_embeddings),
    )


DISTILBERT = bert_family(
    "distilbert",
    NAMES,
    translate,
    masked_lm_classes("DistilBert"),
    FIELDS,
    renamed(lambda config: bert_rows(config, NAMES), BLOCK),
)

FAMILIES = (DISTILBERT,)
