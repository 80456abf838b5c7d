"""Hugging Face configs: read strictly, and written for both transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.family import HEAD, Family, Row
from megatron_ds.hf.registry import FAMILIES, family_of
from megatron_ds.hf.weight_files import has_weights, open_directory
from megatron_ds.models.config import ModelConfig


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face model's config, its translation, and its family.

    Attributes:
        family: the family, with its table.
        config: transformers' config object, defaults filled in.
        core: the translation of the config.
    """

    family: Family
    config: Any
    core: ModelConfig

    def with_tied(self, tied: bool) -> HFModel:
        """Return the same model with the head tied to the embedding, or not."""
        return self if tied == self.core.tied else replace(self, core=replace(self.core, tied=tied))

    @property
    def architecture(self) -> str:
        """Name of transformers' class of the model."""
        return self.family.architecture_of(self.core)

    @cached_property
    def table(self) -> dict[str, Row]:
        """Native name -> row, for each parameter of the model; a tied head has none."""
        table = self.family.table(self.core)
        if self.core.tied:
            table.pop(HEAD, None)
        return table

    @cached_property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the named axes of `table`."""
        return self.core.axis_sizes()


def read_model(source: str | Path | Mapping[str, Any]) -> HFModel:
    """Read a directory's config.json, or a mapping of its fields, which is not changed.

    Raises:
        ConversionError: no config, an unknown family, or a field that changes the math and is not supported.
    """
    if isinstance(source, Mapping):
        place, raw = "model.config", dict(source)
    else:
        place, raw = str(Path(source) / "config.json"), read_json(Path(source) / "config.json")
        if raw.get("model_type") is None:
            raw |= _model_type_by_names(Path(source))
    try:
        family = family_of(raw.get("model_type"))
        family.fields.check(raw)
        config = _transformers_config(raw)
        _refuse_contradictions(raw, config)
        core = _with_heads(family, family.translate(config), raw)
        _check_classes(family, core, raw.get("architectures"))
        if isinstance(source, Mapping) or not (Path(source) / "generation_config.json").is_file():
            generation_config(config, core, raw)  # refuse it now, not at the end of a run when it is written
    except ConversionError as problem:
        raise ConversionError(f"{place}: {problem}") from problem.__cause__
    return HFModel(family, config, core)


# Class name in old versions of transformers and in other code -> its present name.
OLD_CLASSES = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "RWForCausalLM": "FalconForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
}


def _check_classes(family: Family, core: ModelConfig, named: Any) -> None:
    """Refuse a class with other heads than ours: its config alone would become a model of another task.

    A base model without a head passes. If an untied head is missing, the config has to show it, because the weights
    cannot: they could belong to a tied model.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if named is None:
        return
    base = MODEL_MAPPING_NAMES.get(family.model_type)  # None: a family from outside
    heads = family.classes or [family.architecture]
    known = list(dict.fromkeys((*heads, *([base] if base else []))))
    if not isinstance(named, list) or any(OLD_CLASSES.get(name, name) not in known for name in map(str, named)):
        raise ConversionError(
            f"architectures={named!r} is not supported; supported of {family.model_type}: {', '.join(known)}"
        )
    if base in named and family.tied_by_bytes and not core.tied:
        raise ConversionError(
            f"architectures={named!r} with tie_word_embeddings=False leaves out a head that is not the embedding; "
            f"try {family.architecture}, with the head among its weights"
        )


def _with_heads(family: Family, core: ModelConfig, raw: Mapping[str, Any]) -> ModelConfig:
    """Add the heads of the class that the config names, if the family has several; by default those of the first."""
    if not family.classes:
        return core
    named = [name for name in raw.get("architectures") or () if name in family.classes]
    return replace(core, **family.classes[named[0] if named else family.architecture])


def _model_type_by_names(directory: Path) -> dict[str, str]:
    """Return the model type that old configs leave out, if the tensor names belong to only one family."""
    names = open_directory(directory).names if has_weights(directory) else ()
    prefixes = [family.prefix for family in FAMILIES.values()]
    found = {
        family.model_type
        for family in FAMILIES.values()
        if prefixes.count(family.prefix) == 1 and any(name.startswith(family.prefix or "\0") for name in names)
    }
    return {"model_type": found.pop()} if len(found) == 1 else {}


def _transformers_config(raw: Mapping[str, Any]) -> Any:
    """Return transformers' config object, which fills in defaults, translates old names and checks values."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**deepcopy(dict(raw)))
    except Exception as problem:  # transformers and huggingface_hub raise their own types, among them a KeyError
        reason = " ".join(str(problem.args[0] if problem.args else problem).split())
        raise ConversionError(f"transformers refuses it: {reason}") from problem


# Rope fields that Phi-3 does not need in rope_scaling, or keeps elsewhere.
PHI3_ELSEWHERE = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

# Field of transformers 4 -> (kind of layer, rope parameter) of transformers 5. The kind matters only in models with a
# rope for each kind of layer.
OLD_ROPE_FIELDS = {
    "rope_theta": ("full_attention", "rope_theta"),
    "rope_local_base_freq": ("sliding_attention", "rope_theta"),
    "rotary_emb_base": ("full_attention", "rope_theta"),
    "rotary_pct": ("full_attention", "partial_rotary_factor"),
    "partial_rotary_factor": ("full_attention", "partial_rotary_factor"),
}


def _refuse_contradictions(raw: Mapping[str, Any], config: Any) -> None:
    """Refuse contradicting values under two names: versions of transformers differ in the one that they read."""
    for alias, name in (*config.attribute_map.items(), ("n_embed", "hidden_size")):
        if alias in raw and name in raw and raw[alias] != raw[name]:
            raise ConversionError(f"{alias}={raw[alias]!r} contradicts {name}={raw[name]!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    for name, (kind, key) in OLD_ROPE_FIELDS.items():
        value, effective = raw.get(name), rope.get(kind, rope).get(key)
        if value is not None and effective is not None and value != effective:
            raise ConversionError(f"{name}={value!r} contradicts the {key}={effective!r} that transformers takes")
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    new = new.get("full_attention", new)
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            raise ConversionError(f"rope_scaling.{key}={old[key]!r} contradicts rope_parameters.{key}={new[key]!r}")


def generation_config(config: Any, core: ModelConfig, raw: Mapping[str, Any]) -> Any:
    """Return transformers' generation settings for a directory without generation_config.json.

    Args:
        config: transformers' config object, which drops them.
        core: the translation of the config.
        raw: config.json, where old models have these settings and transformers reads them.

    Returns:
        a `GenerationConfig`; None for models that do not generate text.

    Raises:
        ConversionError: transformers refuses the settings, and with them the model.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    if not core.generates:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warnings: settings without effect are kept unchanged
    try:
        return GenerationConfig.from_model_config({**raw, **config.to_dict()})
    except ValueError as problem:
        reason = " ".join(str(problem).split())
        raise ConversionError(f"transformers refuses its settings for generating: {reason}") from problem
    finally:
        logging.set_verbosity(verbosity)


def config_json(model: HFModel, dtype: str) -> dict[str, Any]:
    """Return the content of config.json, with the field names of both transformers 4 and 5 where they differ.

    All fields of the model itself are written, defaults included, because the two versions have different defaults.
    Common fields at their defaults (labels, outputs) are left out, and so are references to code outside the directory.
    """
    from transformers import PreTrainedConfig

    common = PreTrainedConfig().to_dict()
    content = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in common or common[name] != value or name == "transformers_version"
    }
    for name in ("_name_or_path", "auto_map"):
        content.pop(name, None)
    content.update(
        architectures=[model.architecture],
        model_type=model.family.model_type,
        tie_word_embeddings=model.core.tied,
        dtype=dtype,
        torch_dtype=dtype,
    )
    return {**content, **_old_rope_fields(content), **model.family.config_overrides(model.core)}


def _old_rope_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that transformers 4 reads instead of `rope_parameters`, by the names of its config class."""
    parameters = content.get("rope_parameters")
    if not parameters:
        return {}
    rope = parameters.get("full_attention", parameters)
    old: dict[str, Any] = {"rope_scaling": _old_scaling(rope, content)}
    if content["model_type"] == "gpt_neox":
        return {**old, "rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    old["rope_theta"] = rope["rope_theta"]
    if "sliding_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return old


def _old_scaling(rope: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if content["model_type"] != "phi3":
        return scaling
    # its config in transformers 4 accepts only these three fields; the original length is a field of the config itself
    bare = {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return bare if rope.keys() <= {*PHI3_ELSEWHERE, *bare} else scaling


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a Hugging Face directory.

    Raises:
        ConversionError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConversionError(f"{path.parent}: no config.json here; is it a Hugging Face directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ConversionError(f"{path}: not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content
