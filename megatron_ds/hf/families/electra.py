"""ELECTRA's generator: BERT with a narrower embedding, positions, segments and their norm included.

Its discriminator predicts which tokens were replaced, and is another class: `ElectraForPreTraining`, which is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.hf.families.bert import FIELDS as BERT_FIELDS
from megatron_ds.hf.families.bert import MAPPED, HeadNames, bert_family, bert_options, encoder, masked_lm_classes
from megatron_ds.models.bert import EncoderConfig

FIELDS = replace(
    BERT_FIELDS,
    mapped=MAPPED | {"embedding_size"},
    cosmetic=BERT_FIELDS.cosmetic | {f"summary_{part}" for part in ("type", "use_proj", "activation", "last_dropout")},
)
NAMES = HeadNames(
    prefix="electra.",
    transform="generator_predictions.dense",
    norm="generator_predictions.LayerNorm",
    bias="generator_lm_head.bias",
    copies=("generator_lm_head.weight",),
    pooler=None,
    projection="embeddings_project",
)


def translate(config: Any) -> EncoderConfig:
    """Translate an ElectraConfig. The head's activation is fixed."""
    options = {
        "embedding_size": config.embedding_size,
        "embedding_projection": config.embedding_size != config.hidden_size,
        "head_activation": "gelu",
        "pooler": False,
    }
    return encoder(config, **bert_options(config) | options)


ELECTRA = bert_family("electra", NAMES, translate, masked_lm_classes("Electra"), FIELDS)

FAMILIES = (ELECTRA,)
