"""ALBERT (Lan et al. 2020): BERT with a narrower embedding, whose blocks all have the parameters of one.

`AlbertForPreTraining` predicts the order of two segments instead of whether they are neighbours, and is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.hf.families.bert import (
    EQUAL,
    MAPPED,
    HeadNames,
    bert_family,
    bert_options,
    bert_rows,
    encoder,
    masked_lm_classes,
)
from megatron_ds.hf.families.bert import FIELDS as BERT_FIELDS
from megatron_ds.hf.family import renamed
from megatron_ds.models.bert import EncoderConfig

FIELDS = replace(
    BERT_FIELDS,
    mapped=MAPPED | {"embedding_size"},
    equal={
        **{name: EQUAL[name] for name in ("tie_word_embeddings", "position_embedding_type")},
        "num_hidden_groups": (1,),
        "inner_group_num": (1,),
    },
    cosmetic=frozenset({"classifier_dropout_prob"}),
)
NAMES = HeadNames(
    prefix="albert.",
    transform="predictions.dense",
    norm="predictions.LayerNorm",
    bias="predictions.bias",
    copies=("predictions.decoder.weight", "predictions.decoder.bias"),
    pooler="pooler",
    projection="encoder.embedding_hidden_mapping_in",
)
BLOCK = {
    "encoder.layer.{n}": "encoder.albert_layer_groups.0.albert_layers.0",
    **{f"attention.self.{name}": f"attention.{name}" for name in ("query", "key", "value")},
    "attention.output": "attention",
    "intermediate.dense": "ffn",
    "output.dense": "ffn_output",
    "output.LayerNorm": "full_layer_layer_norm",
}


def translate(config: Any) -> EncoderConfig:
    """Translate an AlbertConfig. The feed-forward layer's output has no dropout."""
    options = {
        "embedding_size": config.embedding_size,
        "embedding_projection": True,
        "shared_blocks": True,
        "residual_dropout": 0.0,
        "attention_out_dropout": config.hidden_dropout_prob,
    }
    return encoder(config, **bert_options(config) | options)


ALBERT = bert_family(
    "albert",
    NAMES,
    translate,
    masked_lm_classes("Albert"),
    FIELDS,
    renamed(lambda config: bert_rows(config, NAMES), BLOCK),
)

FAMILIES = (ALBERT,)
