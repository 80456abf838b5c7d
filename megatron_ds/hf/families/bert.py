"""BERT, RoBERTa and its equals: norms after each sum, learned positions and segments, a head tied to the embedding.

Relatives with other names or sizes (distilbert.py, electra.py, albert.py) take their tables from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, padding_id, quotient
from megatron_ds.hf.family import EMBEDDING, Family, Row, linear, norm, separate_qkv
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.bert import EncoderConfig

MAPPED = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "type_vocab_size",
        "initializer_range",
        "layer_norm_eps",
        "pad_token_id",
    ]
)
EQUAL: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}
FIELDS = FieldRules(MAPPED, EQUAL)


@dataclass(frozen=True)
class HeadNames:
    """Names of the modules of a family's heads, and of those that only relatives of BERT have.

    Attributes:
        prefix: of the base model.
        transform, norm: of the head that predicts masked tokens.
        bias: of its logits.
        copies: names of copies of the head's weight, and of its bias if there are any, in old saves.
        next_sentence: of the other head; None = the family has no such head.
        pooler: of the projection of the first position's state; None = the family has none.
        projection: from the embedding's width to that of the blocks.
    """

    prefix: str
    transform: str
    norm: str
    bias: str
    copies: tuple[str, ...]
    next_sentence: str | None = None
    pooler: str | None = "pooler.dense"
    projection: str = ""


BERT_NAMES = HeadNames(
    prefix="bert.",
    transform="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm",
    bias="cls.predictions.bias",
    copies=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    next_sentence="cls.seq_relationship",
)
ROBERTA_NAMES = HeadNames(
    prefix="roberta.",
    transform="lm_head.dense",
    norm="lm_head.layer_norm",
    bias="lm_head.bias",
    copies=("lm_head.decoder.weight", "lm_head.decoder.bias"),
)


def encoder(config: Any, **options: Any) -> EncoderConfig:
    """Translate the fields that all encoders share into the config of the base model; its class adds heads.

    Args:
        config: transformers' config object.
        options: of `EncoderConfig`, from the family's other fields.
    """
    shared: dict[str, Any] = {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "tied": True,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_attention_heads,
        "causal": False,
        "init_std": config.initializer_range,
        "embedding_size": config.hidden_size,
        "padding_id": padding_id(config),
        "masked_lm": False,
    }
    if "head_dim" not in options:
        shared["head_dim"] = quotient(config, "hidden_size", "num_attention_heads")
    return EncoderConfig(**{**shared, **options})


POST_NORM = {"norm_place": "sum", "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}


def bert_options(config: Any) -> dict[str, Any]:
    """Return the options that follow from the fields of a BertConfig."""
    act = activation("hidden_act", config.hidden_act)
    return {
        **POST_NORM,
        "ffn_size": config.intermediate_size,
        "norm": NormStyle("layer", config.layer_norm_eps),
        "activation": act,
        "head_activation": act,
        "attention_dropout": config.attention_probs_dropout_prob,
        "residual_dropout": config.hidden_dropout_prob,
        "embedding_dropout": config.hidden_dropout_prob,
        "positions": PositionTable(config.max_position_embeddings),
        "num_token_types": config.type_vocab_size,
        "pooler": True,
    }


def translate_bert(config: Any) -> EncoderConfig:
    """Translate a BertConfig."""
    return encoder(config, **bert_options(config))


def translate_roberta(config: Any) -> EncoderConfig:
    """Translate a RobertaConfig. Positions begin after the padding's, and the head's activation is fixed."""
    padding, rows = padding_id(config), config.max_position_embeddings
    if padding is None:
        raise ConversionError("pad_token_id=None is not supported: roberta's positions begin after it; nearest: 1")
    if rows < padding + 2:
        raise ConversionError(
            f"max_position_embeddings={rows} leaves no position after pad_token_id={padding}; nearest: {padding + 2}"
        )
    positions = PositionTable(rows - padding - 1, offset=padding + 1, skipped_id=padding)
    return encoder(config, **bert_options(config) | {"positions": positions, "head_activation": "gelu"})


def bert_rows(config: EncoderConfig, names: HeadNames) -> list[Row]:
    """Return the table of BERT and of relatives that have no other names than those of heads."""
    prefix = names.prefix if config.masked_lm else ""  # transformers writes a model without a head so
    native, theirs, embeddings = "blocks.{n}", f"{prefix}encoder.layer.{{n}}", f"{prefix}embeddings"
    q, k, v = (f"{theirs}.attention.self.{part}" for part in ("query", "key", "value"))
    table = [
        Row(EMBEDDING, (f"{embeddings}.word_embeddings.weight",), copy("v e"), "v"),
        Row("entry.positions.weight", (f"{embeddings}.position_embeddings.weight",), copy("p e")),
        *norm("entry.norm", f"{embeddings}.LayerNorm", config.norm, "e"),
        *separate_qkv(f"{native}.attention.qkv", q, k, v, bias=True),
        *linear(f"{native}.attention.out", f"{theirs}.attention.output.dense", "h (n d)", "n", bias=True),
        *norm(f"{native}.attention_output_norm", f"{theirs}.attention.output.LayerNorm", config.norm),
        *linear(f"{native}.mlp.up", f"{theirs}.intermediate.dense", "f h", "f", bias=True),
        *linear(f"{native}.mlp.down", f"{theirs}.output.dense", "h f", "f", bias=True),
        *norm(f"{native}.mlp_output_norm", f"{theirs}.output.LayerNorm", config.norm),
    ]
    if config.num_token_types:
        table.append(Row("entry.token_types.weight", (f"{embeddings}.token_type_embeddings.weight",), copy("s e")))
    if config.embedding_projection:
        table += linear("entry.projection", f"{prefix}{names.projection}", "h e", None, bias=True)
    if config.masked_lm:
        table += linear("head.transform", names.transform, "e h", None, bias=True)
        table += norm("head.norm", names.norm, config.norm, "e")
        table.append(Row("head.bias", (names.bias,), copy("v"), "v"))
    if config.next_sentence:
        table += linear("head.next_sentence.pooler.dense", f"{prefix}{names.pooler}", "h i", None, bias=True)
        table += linear("head.next_sentence.out", f"{names.next_sentence}", "c i", None, bias=True)
    elif config.pooler:
        table += linear("head.pooler.dense", f"{prefix}{names.pooler}", "h i", None, bias=True)
    return table


def _detect_heads(config: EncoderConfig, on_disk: frozenset[str], names: HeadNames) -> EncoderConfig:
    """Set the heads whose tensors are on disk."""
    masked_lm = f"{names.transform}.weight" in on_disk
    next_sentence = masked_lm and f"{names.next_sentence}.weight" in on_disk
    pooled = any(f"{prefix}{names.pooler}.weight" in on_disk for prefix in ("", names.prefix))
    pooler = next_sentence if masked_lm else pooled
    return replace(config, masked_lm=masked_lm, next_sentence=next_sentence, pooler=pooler)


def _unused_tensors(config: EncoderConfig, names: HeadNames) -> tuple[str, ...]:
    """Name the tensors of a pooler that no head uses; old saves have one in addition to the head for masked tokens."""
    if not config.masked_lm or config.pooler or names.pooler is None:
        return ()
    return tuple(f"{names.prefix}{names.pooler}.{part}" for part in ("weight", "bias"))


def _load_options(config: EncoderConfig) -> dict[str, Any]:
    """transformers' base encoders have a pooler unless this option leaves it out; no config field does."""
    return {} if config.masked_lm or config.pooler else {"add_pooling_layer": False}


def bert_family(
    model_type: str,
    names: HeadNames,
    translate: Callable[[Any], EncoderConfig],
    classes: Mapping[str, Mapping[str, Any]],
    fields: FieldRules = FIELDS,
    rows: Callable[[EncoderConfig], list[Row]] | None = None,
) -> Family:
    """Return a family with BERT's heads.

    Args:
        model_type, translate, classes, fields: as in `Family`.
        names: of its heads.
        rows: its table; None = BERT's with these names.
    """
    prefix = names.prefix.replace(".", r"\.")
    weight = f"{names.prefix}embeddings.word_embeddings.weight"
    return Family(
        model_type=model_type,
        architecture=next(iter(classes)),
        prefix=names.prefix,
        fields=fields,
        translate=translate,
        rows=rows or (lambda config: bert_rows(config, names)),
        ignored=(rf"^({prefix})?embeddings\.(position|token_type)_ids$",),
        aliases=dict(zip(names.copies, (weight, names.bias))),
        classes=classes,
        detect_heads=lambda config, on_disk: _detect_heads(config, on_disk, names),
        unused_tensors=lambda config: _unused_tensors(config, names),
        load_options=_load_options if names.pooler is not None else lambda config: {},
    )


MASKED_LM = {"masked_lm": True, "pooler": False, "next_sentence": False}
PRETRAINING = {"masked_lm": True, "pooler": True, "next_sentence": True}
NO_HEAD = {"masked_lm": False, "next_sentence": False}


def head_of(tensor: str) -> Callable[[EncoderConfig, frozenset[str]], EncoderConfig]:
    """Return a test for the head that predicts masked tokens by the name of one of its tensors; see `Family`."""
    return lambda config, on_disk: replace(config, masked_lm=tensor in on_disk)


def masked_lm_classes(name: str) -> dict[str, Mapping[str, Any]]:
    """Return the classes of a family without pretraining by pairs, whose names begin with `name`."""
    return {f"{name}ForMaskedLM": MASKED_LM, f"{name}Model": NO_HEAD}


BERT = bert_family(
    "bert",
    BERT_NAMES,
    translate_bert,
    {"BertForMaskedLM": MASKED_LM, "BertForPreTraining": PRETRAINING, "BertModel": NO_HEAD},
)
ROBERTA = bert_family("roberta", ROBERTA_NAMES, translate_roberta, masked_lm_classes("Roberta"))

# RoBERTa's code under other names, which a directory keeps.
XLM_ROBERTA, CAMEMBERT = (
    replace(
        ROBERTA,
        model_type=model_type,
        same_as="roberta",
        architecture=f"{prefix}ForMaskedLM",
        classes=masked_lm_classes(prefix),
    )
    for model_type, prefix in (("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))
)

FAMILIES = (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT)
