"""The family of a config: by `model_type`, former names included, by `architectures`, or by fields and tensor names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.family import EMBEDDING, HEAD, Family
from megatron_ds.hf.label_classes import label_classes, labelled
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.tensor_names import shorter_names
from megatron_ds.models.config import ModelConfig

# Class name in old versions of transformers and in other code -> its present name.
OLD_CLASSES = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "RWForCausalLM": "FalconForCausalLM",
    "RWModel": "FalconModel",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "IQuestCoderForCausalLM": "LlamaForCausalLM",
}


@dataclass(frozen=True)
class FormerType:
    """A `model_type` that is not written any more, or whose fields had other names, and the family that it is today.

    Attributes:
        model_type: its present `model_type`.
        fields: former name of a field -> present name.
        needs: fields whose default values were other ones, so that they must be given.
        implied: fields that had to be given later on, with the values that the former type stands for.
    """

    model_type: str
    fields: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    implied: Mapping[str, Any] = field(default_factory=dict)


_RW_FIELDS = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
_NOMIC_FIELDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
}
FORMER_TYPES = {
    "nomic_bert": FormerType("nomic_bert", _NOMIC_FIELDS),  # the hub's words, which transformers does not read
    "gpt-sw3": FormerType("gpt2"),  # transformers reads it as gpt2, and writes that
    "RefinedWebModel": FormerType("falcon", _RW_FIELDS, ("multi_query", "parallel_attn")),
    "RefinedWeb": FormerType("falcon", _RW_FIELDS, ("parallel_attn",), {"new_decoder_architecture": True}),
}

# Relatives of supported families -> the parts of them that are not implemented.
MISSING_PARTS = {
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "deepseek_v32": "multi-head latent attention over chosen keys",
    "glm4_moe_lite": "multi-head latent attention",
    "glm_moe_dsa": "multi-head latent attention over chosen keys",
    "qwen3_next": "layers with a gated delta rule, and attention with an output gate",
    "qwen3_5_moe_text": "layers with a gated delta rule, and attention with an output gate",
    "qwen3_5_text": "layers with a gated delta rule, and attention with an output gate",
    "llama4_text": "attention in chunks, and weights of experts that multiply their inputs",
    "hunyuan_v1_moe": "norms of queries and keys after the rotation",
    "phimoe": "a router that samples in training (SparseMixer)",
}


def in_present_words(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the present `model_type` and the present names of its fields.

    Raises:
        ConversionError: a field has two values, or is missing although its default value has changed.
    """
    asked = raw.get("model_type")
    former = FORMER_TYPES.get(asked) if isinstance(asked, str) else None
    if former is None:
        return dict(raw)
    for old, new in former.fields.items():
        if old in raw and new in raw and raw[old] != raw[new]:
            raise ConversionError(f"{old}={raw[old]!r} contradicts {new}={raw[new]!r}")
    found = {**former.implied, **{former.fields.get(name, name): value for name, value in raw.items()}}
    for name in former.needs:
        if found.get(name) is None:
            raise ConversionError(
                f"{name} is missing, whose default is another one in model_type={asked!r} than in "
                f"{former.model_type}; add it"
            )
    return {**found, "model_type": former.model_type}


def base_class(family: Family) -> str | None:
    """Return the name of transformers' class of a family's base model.

    None for a family from outside, and where modules pass through: there a base model has other names for all tensors.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = MODEL_MAPPING_NAMES.get(family.model_type) if not family.passes_through else None
    return found if isinstance(found, str) else None


def class_names(family: Family) -> list[str]:
    """Return the names of transformers' classes that are read as models of a family, its own classes first."""
    base = base_class(family)
    own = family.classes or [family.architecture]
    return list(dict.fromkeys((*own, *([base] if base else []), *label_classes(family))))


def present_classes(named: Any) -> list[str]:
    """Return `architectures` in present names; an empty list if it is not a list."""
    return [OLD_CLASSES.get(str(name), str(name)) for name in named] if isinstance(named, list) else []


def find_family(raw: Mapping[str, Any], tensors: Callable[[], Sequence[str]] = tuple) -> Family:
    """Return the family of a config.

    Args:
        raw: the config, in present words.
        tensors: reads the names of the tensors on disk, if there are any.

    Raises:
        ConversionError: the model is of no supported family, or could be of several.
    """
    model_type = raw.get("model_type")
    if model_type is None:
        return _without_type(raw, tensors)
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ConversionError(f"model_type={model_type!r} is not supported; {_advice(raw, tensors)}")


def with_heads(family: Family, core: ModelConfig, named: Any, config: Any) -> tuple[Family, ModelConfig]:
    """Return the family and the model with the heads of the class that `architectures` names.

    By default they are those of the family's first class.

    Args:
        family: the family.
        core: the model as the family translates it.
        named: `architectures`.
        config: transformers' config object.

    Raises:
        ConversionError: the class has a head for labels, and the config's fields of it are not supported.
    """
    classes = present_classes(named)
    for_labels = [name for name in classes if name in label_classes(family)]
    if for_labels:
        return labelled(family, for_labels[0], core, config)
    if not family.classes:
        return family, core
    known = [name for name in classes if name in family.classes]
    return family, replace(core, **family.classes[known[0] if known else family.architecture])


def _without_type(raw: Mapping[str, Any], tensors: Callable[[], Sequence[str]]) -> Family:
    """Return the family of a config without `model_type`, as transformers wrote it until 2020."""
    known = f"supported: {', '.join(FAMILIES.names)}"
    named = present_classes(raw.get("architectures"))
    if named:
        having = [family for family in FAMILIES.values() if set(named) & set(class_names(family))]
        found = [family for family in having if not family.always_named] or having
        rule = f"model_type is missing, and architectures={raw['architectures']!r} belongs to no supported family"
    else:
        on_disk = tensors()
        searched = [one for one in FAMILIES.values() if not (one.same_as or one.always_named)]
        found = [one for one in searched if on_disk and _fits(one, raw, on_disk)]
        rule = "model_type is missing"
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(family.model_type for family in found)
        raise ConversionError(f"model_type is missing, and fields and tensors are those of {names}; add the right one")
    raise ConversionError(f"{rule}; {known}")


def _advice(raw: Mapping[str, Any], tensors: Callable[[], Sequence[str]]) -> str:
    """Return the fix for an unknown `model_type`.

    A family is only named if its name is near, and its table fits: a similar name alone says nothing of a model, and
    a model that transformers knows by this name is no misspelling.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type, supported = str(raw["model_type"]), f"supported: {', '.join(FAMILIES.names)}"
    if isinstance(raw.get("text_config"), Mapping):
        seeing = [family.model_type for family in FAMILIES.values() if family.passes_through]
        return f"it is more than a text model, and of those only these are: {', '.join(seeing)}"
    if model_type in MISSING_PARTS:
        return f"it needs {MISSING_PARTS[model_type]}; {supported}"
    if model_type in CONFIG_MAPPING_NAMES:
        return supported
    if raw.get("auto_map"):
        return f"its code is in the directory (auto_map), and is not run; {supported}"
    near = difflib.get_close_matches(model_type.lower(), FAMILIES.names, n=3)
    on_disk = tensors() if near else ()
    fitting = [name for name in near if _fits(FAMILIES[name], raw, on_disk, strict=True)]
    return f"nearest: {fitting[0]}" if fitting else supported


def _fits(family: Family, raw: Mapping[str, Any], tensors: Collection[str], *, strict: bool = False) -> bool:
    """Test whether a config's fields, and the names of the tensors if there are any, are those of a family.

    Args:
        family: the family.
        raw: the config; its `model_type` is not compared.
        tensors: names on disk.
        strict: whether fields outside the family's rules do not fit even if its code does not read them.
    """
    try:
        raw = family.complete_fields({**raw, "model_type": family.model_type})
        unread = family.check_fields(raw)
        if strict and unread:
            return False
        config = family.transformers_config(raw)
        family, core = with_heads(family, family.translate(config), raw.get("architectures"), config)
    except ConversionError:
        return False
    forms = [list(tensors), *(list(short.values()) for short, _ in shorter_names(list(tensors), list(tensors)))]
    return not tensors or any(_has_names(family, family.detect_heads(core, frozenset(one)), one) for one in forms)


def _has_names(family: Family, core: ModelConfig, tensors: Collection[str]) -> bool:
    """Test whether the tensors of a family's table are on disk and no others, whatever their prefix."""
    table = family.table(core)
    head = set(table.pop(HEAD).names) if HEAD in table else set()
    if core.tied and head & set(tensors):
        head |= set(table[EMBEDDING].names)  # one of the two names is enough
    if family.passes_through and not any(re.search(one, name) for one in family.passes_through for name in tensors):
        return False
    wanted = {name.removeprefix(family.prefix) for row in table.values() for name in row.names}
    ignored = [*family.aliases, *family.unused_tensors(core), *head]
    optional = {name.removeprefix(family.prefix) for name in ignored}
    found = {
        re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name.removeprefix(family.prefix)))
        for name in tensors
        if not any(re.search(pattern, name) for pattern in (*family.ignored, *family.passes_through))
    }
    return wanted - optional <= found <= wanted | optional
