"""transformers' classes with a head for labels: `*ForSequenceClassification` and `*ForTokenClassification`.

Decoders share two forms of it, which every type has for which transformers names such a class. The classes of encoders
differ in the state that they pick and in what precedes the last projection; `CLASSES` has one entry for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_translation import activation
from megatron_ds.hf.family import Family, Row, linear, norm
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.label_head import PROBLEMS, LabelHeadConfig

OF_HEAD = "head."
DROPOUT = 0.1  # of a class whose config says nothing


@dataclass(frozen=True)
class LabelClass:
    """The head of one of transformers' classes.

    Attributes:
        pick: see `LabelHeadConfig`; or the name of a config field whose value is a key of `POOLINGS`.
        out: name of the last projection.
        bias: it has a bias; or the name of a config field that says so, true by default.
        width: named axis of the states that the head takes.
        dense: name of the projection before; None = no such projection.
        dense_bias: it has a bias; or the name of a config field.
        activation: after it; or the name of a config field.
        norm: name of the norm after that; None = no norm.
        dropout: config fields with the probability before `out`, of which the first that is set counts; empty = none.
        inner: there is the same dropout before `dense`.
        base: prefix of all tensors of the base model in this class alone.
    """

    pick: str = "last"
    out: str = "score"
    bias: bool | str = False
    width: str = "h"
    dense: str | None = None
    dense_bias: bool | str = True
    activation: str = "tanh"
    norm: str | None = None
    dropout: tuple[str, ...] = ()
    inner: bool = False
    base: str = ""


POOLINGS = {"cls": ("first", False), "bos": ("first", False), "mean": ("mean", False), "late": ("mean", True)}

_OF_DECODERS = ("classifier_dropout", "hidden_dropout")
_OF_ENCODERS = ("classifier_dropout", "hidden_dropout_prob")
SEQUENCE = LabelClass()
TOKEN = LabelClass(pick="each", bias="token_classification_bias", dropout=_OF_DECODERS)
_OLD_TOKEN = LabelClass(pick="each", out="classifier", bias=True, dropout=_OF_DECODERS)
_BERT = LabelClass(
    pick="first", out="classifier", bias=True, dense="bert.pooler.dense", activation="tanh", dropout=_OF_ENCODERS
)
_ROBERTA = replace(_BERT, dense="classifier.dense", out="classifier.out_proj", inner=True)
_ENCODER_TOKEN = LabelClass(pick="each", out="classifier", bias=True, dropout=_OF_ENCODERS)
_T5 = replace(_ROBERTA, pick="last_eos", dense="classification_head.dense", out="classification_head.out_proj")
_T5 = replace(_T5, dropout=("classifier_dropout",), base="transformer.")
_MODERNBERT = LabelClass(
    pick="classifier_pooling",
    out="classifier",
    bias=True,
    dense="head.dense",
    dense_bias="classifier_bias",
    activation="classifier_activation",
    norm="head.norm",
    dropout=("classifier_dropout",),
)
_EUROBERT = LabelClass(pick="classifier_pooling", out="classifier", bias=True, dense="dense", activation="gelu")
_ALBERT_DROPOUT = ("classifier_dropout_prob", "hidden_dropout_prob")

# Classes that are not of the generic form; None = not supported.
CLASSES: dict[str, LabelClass | None] = {
    **{
        f"{name}ForTokenClassification": _OLD_TOKEN
        for name in ("GPT2", "GPTNeoX", "GPTNeo", "GPTBigCode", "Bloom", "Falcon")
    },
    "BioGptForTokenClassification": _ENCODER_TOKEN,
    "OPTForSequenceClassification": LabelClass(width="e"),
    "BertForSequenceClassification": _BERT,
    "BertForTokenClassification": _ENCODER_TOKEN,
    **{f"{name}ForSequenceClassification": _ROBERTA for name in ("Roberta", "XLMRoberta", "Camembert")},
    **{f"{name}ForTokenClassification": _ENCODER_TOKEN for name in ("Roberta", "XLMRoberta", "Camembert")},
    "ElectraForSequenceClassification": replace(_ROBERTA, activation="gelu"),
    "ElectraForTokenClassification": _ENCODER_TOKEN,
    "DistilBertForSequenceClassification": replace(
        _BERT, dense="pre_classifier", activation="relu", dropout=("seq_classif_dropout",)
    ),
    "DistilBertForTokenClassification": replace(_ENCODER_TOKEN, dropout=("dropout",)),
    "AlbertForSequenceClassification": replace(_BERT, dense="albert.pooler", dropout=_ALBERT_DROPOUT[:1]),
    "AlbertForTokenClassification": replace(_ENCODER_TOKEN, dropout=_ALBERT_DROPOUT),
    "NomicBertForSequenceClassification": replace(_BERT, dense="nomic_bert.pooler.dense"),
    "NomicBertForTokenClassification": _ENCODER_TOKEN,
    "ModernBertForSequenceClassification": _MODERNBERT,
    "ModernBertForTokenClassification": replace(_MODERNBERT, pick="each"),
    "EuroBertForSequenceClassification": _EUROBERT,
    "EuroBertForTokenClassification": LabelClass(pick="each", out="classifier", bias=True),
    "T5ForSequenceClassification": _T5,
    "MT5ForSequenceClassification": _T5,
    "T5ForTokenClassification": None,  # of the encoder alone
    "MT5ForTokenClassification": None,
}


def label_classes(family: Family) -> dict[str, LabelClass]:
    """Return the classes with a head for labels that transformers has for a `model_type`, by name.

    The one for texts comes first. A family with several classes of its own has those in `CLASSES` alone; a text model
    inside a model of text and images has none.
    """
    from transformers.models.auto import modeling_auto

    if family.passes_through:
        return {}
    generic = not family.classes
    found: dict[str, LabelClass] = {}
    for names, form in (
        (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, SEQUENCE),
        (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, TOKEN),
    ):
        name = names.get(family.model_type)
        one = CLASSES.get(name, form if generic else None) if isinstance(name, str) else None
        if name is not None and one is not None:
            found[name] = one
    return found


def labelled(family: Family, name: str, core: Any, config: Any) -> tuple[Family, Any]:
    """Return the family and the model with the head of a class.

    Args:
        family: the family of the model.
        name: the name of the class.
        core: the model as the family translates it, a `ModelConfig`.
        config: transformers' config object.

    Raises:
        ConversionError: the config's labels contradict one another.
    """
    form = label_classes(family)[name]
    own = family.classes.get(family.architecture, {})
    without = {option: False for option in ("masked_lm", "pooler", "next_sentence") if option in own}

    def rows_of(rows: Callable[[Any], list[Row]]) -> Callable[[Any], list[Row]]:
        def labelled_rows(core: Any) -> list[Row]:
            body = rows(replace(core, labels=None, **own))
            kept = [_under(form.base, row) for row in body if not row.native.startswith(OF_HEAD)]
            return [*kept, *_head_rows(form, core.labels)]

        return labelled_rows

    def unused_tensors(core: Any) -> tuple[str, ...]:
        """Name the pooler that old saves have, and no head here uses."""
        used = {name for row in _head_rows(form, core.labels) for name in row.names}
        return tuple(name for name in family.unused_tensors(replace(core, labels=None, **own)) if name not in used)

    changed = replace(
        family,
        prefix=form.base + family.prefix,
        rows=rows_of(family.rows),
        other_rows=tuple(map(rows_of, family.other_rows)),
        aliases=_aliases(family, form.base),
        ignored=(*family.ignored, *(pattern.replace("^", f"^{re.escape(form.base)}", 1) for pattern in family.ignored)),
        classes={name: {}},
        detect_heads=lambda core, on_disk: core,
        unused_tensors=unused_tensors,
        load_options=lambda core: {},
        tied_by_bytes=False,
    )
    return changed, replace(core, labels=_head(form, config), **without)


def headless(family: Family, name: str, core: Any) -> tuple[Family, Any]:
    """Return the family and the model of the class of a base model, without a head and without its prefix of names."""

    def rows_of(rows: Callable[[Any], list[Row]]) -> Callable[[Any], list[Row]]:
        def base_rows(core: Any) -> list[Row]:
            return [
                replace(row, names=tuple(one.removeprefix(family.prefix) for one in row.names))
                for row in rows(core)
                if not row.native.startswith(OF_HEAD)
            ]

        return base_rows

    changed = replace(
        family,
        rows=rows_of(family.rows),
        other_rows=tuple(map(rows_of, family.other_rows)),
        classes={name: {}},
    )
    return changed, replace(core, head=False)


def _under(base: str, row: Row) -> Row:
    if not base:
        return row
    names, copies = (tuple(f"{base}{one}" for one in names) for names in (row.names, row.copies))
    return replace(row, names=names, copies=copies)


def _aliases(family: Family, base: str) -> dict[str, str]:
    """Return the aliases of tensors of the base model: under its prefix, and as they are in another class."""
    found = {**family.aliases}
    if base:
        found = {f"{prefix}{alias}": f"{base}{name}" for alias, name in found.items() for prefix in ("", base)}
    return found


def _head_rows(form: LabelClass, head: LabelHeadConfig) -> list[Row]:
    rows = []
    if form.dense is not None:
        rows += linear("head.dense", form.dense, "h i", None, bias=head.dense_bias)
    if form.norm is not None and head.norm is not None:
        rows += norm("head.norm", form.norm, head.norm)
    return rows + linear("head.out", form.out, f"y {form.width}", None, bias=head.bias)


def _head(form: LabelClass, config: Any) -> LabelHeadConfig:
    """Translate the fields of a config that its head for labels reads."""
    pick, late = (form.pick, False) if not hasattr(config, form.pick) else _pooling(config, form.pick)
    markers = {"last": "pad_token_id", "last_eos": "eos_token_id"}
    dropout = _dropout(form, config)
    return LabelHeadConfig(
        pick=pick,
        late=late,
        pick_id=getattr(config, markers[pick]) if pick in markers else None,
        num_labels=_num_labels(config),
        problem=_problem(config),
        dense=form.dense is not None,
        dense_bias=_flag(config, form.dense_bias),
        activation=_activation(config, form.activation),
        norm=_norm(config) if form.norm is not None else None,
        bias=_flag(config, form.bias),
        dropout=dropout,
        inner_dropout=dropout if form.inner else 0.0,
        std=_std(config),
    )


def _pooling(config: Any, field: str) -> tuple[str, bool]:
    value = getattr(config, field)
    if value not in POOLINGS:
        raise ConversionError(f"{field}={value!r} is not supported; supported: {', '.join(POOLINGS)}")
    return POOLINGS[value]


def _flag(config: Any, value: bool | str) -> bool:
    return bool(getattr(config, value, True)) if isinstance(value, str) else value


def _activation(config: Any, value: str) -> str:
    return activation(value, getattr(config, value)) if hasattr(config, value) else value


def _norm(config: Any) -> NormStyle:
    return NormStyle("layer", config.norm_eps, bias=config.norm_bias)


def _dropout(form: LabelClass, config: Any) -> float:
    given = [getattr(config, name, None) for name in form.dropout]
    default = DROPOUT if form.dropout == _OF_DECODERS else 0.0
    return next((float(value) for value in given if value is not None), default)


def _std(config: Any) -> float:
    if hasattr(config, "initializer_factor") and hasattr(config, "d_model"):
        return float(config.initializer_factor * config.d_model**-0.5)
    given = (getattr(config, name, None) for name in ("initializer_range", "init_std"))
    return next((float(value) for value in given if value is not None), 0.02)


def _problem(config: Any) -> str | None:
    found = config.problem_type
    if found not in (None, *PROBLEMS):
        raise ConversionError(f"problem_type={found!r} is not supported; supported: {', '.join(PROBLEMS)}, or null")
    if found == "single_label_classification" and config.num_labels == 1:
        raise ConversionError(f"problem_type={found!r} has nothing to choose with one label; nearest: regression")
    return found


def _num_labels(config: Any) -> int:
    names: Mapping[int, str] = config.id2label
    if sorted(names) != list(range(len(names))):
        raise ConversionError(f"id2label={dict(names)!r} must name the labels 0 to {len(names) - 1}")
    return len(names)
