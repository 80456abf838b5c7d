"""Families of models that see: the text model is trained, and the modules around it pass through unchanged.

Text alone has the same position on all axes of a rotation over several (mRoPE), and attends causally. So the text model
of each of these is that of a family of text models, under other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.family import Family, renamed
from megatron_ds.hf.quantised import FIELDS as QUANTISED
from megatron_ds.models.gpt import DecoderConfig

TEXT = "text_config"
NO_LAYERS = "per_layer_config"
"""Field that may be empty, which transformers refuses in a config whose layers are those of text_config."""
MULTI_AXIS_ROPE = frozenset({"mrope_section", "mrope_interleaved"})
"""Fields of a rotation over several axes, which do nothing where all axes have the same position."""

COPIES_THAT_MAY_DIFFER = frozenset({"initializer_range", "pad_token_id"})
"""Fields at the top that transformers does not read there, and that are often others than those of text_config."""


@dataclass(frozen=True)
class TextNames:
    """Names of a text model's parts in a larger model: its body, "model" in the text model alone, and its head."""

    body: str
    head: str = "lm_head"


@dataclass(frozen=True)
class VisionLanguage(Family):
    """A family whose text model is described by the part `text_config` of its config.

    Attributes:
        texts: `model_type` of text_config -> the family of this text model; the default comes first.
        flat: old configs have the fields of text_config at the top.
    """

    texts: Mapping[str, Family] = field(default_factory=dict)
    flat: bool = False

    def check_fields(self, raw: Mapping[str, Any]) -> list[str]:
        """Check the fields of the config and of text_config; returns those at the top without effect.

        Raises:
            ConversionError: see `FieldRules.check`; or a field at the top contradicts text_config, or the weights are
                quantised.
        """
        inner, family = self._text(raw)
        for name in QUANTISED:
            if raw.get(name) or inner.get(name):
                raise ConversionError(f"{name} is not supported in a {self.model_type}; try weights in bfloat16")
        with _inside("" if raw.get(TEXT) is None else f"{TEXT}."):
            family.check_fields(inner)
        rules = family.fields
        repeated = (rules.mapped | rules.equal.keys() | rules.training | rules.cosmetic) - COPIES_THAT_MAY_DIFFER
        for name in sorted(repeated & raw.keys() - self.fields.mapped - self.fields.cosmetic):
            if name not in inner:
                raise ConversionError(
                    f"{name}={raw[name]!r} is at the top, where transformers does not read it; move it to {TEXT}"
                )
            if raw[name] != inner[name]:
                raise ConversionError(f"{name}={raw[name]!r} contradicts {TEXT}.{name}={inner[name]!r}")
        own = {name: value for name, value in raw.items() if name in self.fields or name not in rules}
        return super().check_fields(own)

    def transformers_config(self, raw: Mapping[str, Any]) -> Any:
        """Return transformers' config object; see `Family.transformers_config`."""
        return super().transformers_config({name: value for name, value in raw.items() if name != NO_LAYERS})

    def parts_of_config(self, raw: Mapping[str, Any], config: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Yield the fields and transformers' config object of the config itself, and of text_config."""
        yield raw, config
        yield self._text(raw)[0], config.text_config

    def _text(self, raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], Family]:
        """Return the fields of the text model, and its family."""
        given = raw.get(TEXT)
        if given is not None and not isinstance(given, Mapping):
            raise ConversionError(f"{TEXT}={given!r} must be a mapping of the text model's fields")
        default, *_ = self.texts
        name = (given or {}).get("model_type", default)
        if name not in self.texts:
            raise ConversionError(
                f"{TEXT}.model_type={name!r} is not supported in a {self.model_type}; supported: "
                f"{', '.join(self.texts)}"
            )
        if given is not None or not self.flat:
            return given or {}, self.texts[name]
        rules = self.texts[name].fields
        flat = {field: value for field, value in raw.items() if field in rules and field not in self.fields}
        return flat, self.texts[name]


def vision_language(
    model_type: str,
    architecture: str,
    texts: Sequence[Family],
    names: Sequence[TextNames],
    passes_through: Sequence[str],
    placeholders: Sequence[str],
    seeing: Sequence[str] = (),
    *,
    caps_logits: bool = False,
    flat: bool = False,
) -> VisionLanguage:
    """Return a family whose text model is one of `texts`.

    Args:
        model_type, architecture: see `Family`.
        texts: families of its possible text models, the default first; they have one table.
        names: the names of the text model on the hub, then others; those of transformers' modules in memory last.
        passes_through: names of the modules and parameters around the text model.
        placeholders: config fields with ids of tokens that stand for images or mark them.
        seeing: config fields of the modules around the text model, besides `vision_config`.
        caps_logits: the class bounds the logits as the text model alone does.
        flat: see `VisionLanguage`.
    """
    tables = {text.rows for text in texts}
    assert len(tables) == 1, f"{model_type}: its text models have different tables"
    rows, *other_rows = (renamed(texts[0].rows, {"model": one.body, "lm_head": one.head}) for one in names)
    bodies = "|".join(re.escape(one.body) for one in names)
    by_type = {text.model_type: text for text in texts}
    return VisionLanguage(
        model_type,
        architecture,
        prefix="",
        fields=FieldRules(
            frozenset({TEXT, "tie_word_embeddings"}),
            cosmetic=frozenset({"vision_config", *placeholders, *seeing}),
        ),
        translate=partial(_translate, model_type, by_type, caps_logits),
        rows=rows,
        other_rows=tuple(other_rows),
        ignored=(rf"^({bodies})\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",),
        passes_through=tuple(rf"^(model\.)?{name}(\.|$)" for name in passes_through),
        placeholder_ids=partial(_placeholder_ids, placeholders),
        texts=by_type,
        flat=flat,
        always_named=True,
    )


def _translate(model_type: str, texts: Mapping[str, Family], caps_logits: bool, config: Any) -> DecoderConfig:
    """Translate the text model, whose head is the larger model's: it decides the tie, and may not bound the logits."""
    text = copy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings
    text.rope_parameters = {name: value for name, value in text.rope_parameters.items() if name not in MULTI_AXIS_ROPE}
    with _inside(f"{TEXT}."):
        core = texts[text.model_type].translate(text)
    softcap = core.logit_softcap if caps_logits else None
    return replace(core, family=model_type, logit_softcap=softcap)


def _placeholder_ids(names: Sequence[str], config: Any) -> dict[str, int]:
    given = {name: getattr(config, name, None) for name in names if name not in config.attribute_map}
    return {name: value for name, value in given.items() if isinstance(value, int)}


@contextmanager
def _inside(prefix: str) -> Iterator[None]:
    """Name the part of the config that holds a refused field, which begins the message."""
    try:
        yield
    except ConversionError as problem:
        raise ConversionError(f"{prefix}{problem}") from problem.__cause__
