"""The content of config.json in exports, for both transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from megatron_ds.hf.config import HFModel
from megatron_ds.hf.special_floats import encode_floats

# Rope fields that Phi-3 does not need in rope_scaling, or keeps elsewhere.
PHI3_ELSEWHERE = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def config_json(model: HFModel, dtype: str) -> dict[str, Any]:
    """Return the content of config.json, with the field names of both transformers 4 and 5 where they differ.

    All fields of the model itself are written, defaults included, because the two versions have different defaults.
    Common fields at their defaults (labels, outputs) are left out, and so are references to code outside the directory.
    """
    from transformers import PreTrainedConfig

    if model.family.passes_through:
        return _kept_config_json(model, dtype)
    common = PreTrainedConfig().to_dict()
    content = {
        name: encode_floats(value)
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
    family = model.family
    old = _old_rope_fields(content, family.old_rope_names)
    known = {name: value for name, value in old.items() if name in family.fields}
    return {**model.unread, **content, **known, **family.config_overrides(model.core)}


def _kept_config_json(model: HFModel, dtype: str) -> dict[str, Any]:
    """Return config.json as it is on disk, for a model that is not translated as a whole.

    Only the dtype, the version, and a tie that the weights have undone are changed; references to code that exports do
    not carry are left out.
    """
    from transformers import __version__

    content = {name: value for name, value in deepcopy(dict(model.on_disk)).items() if name != "auto_map"}
    content.setdefault("architectures", [model.architecture])
    content.update(dtype=dtype, torch_dtype=dtype, transformers_version=__version__)
    text = content.get("text_config") or {}
    text.update({name: dtype for name in ("dtype", "torch_dtype") if name in text})
    if model.core.tied != model.config.tie_word_embeddings:
        content["tie_word_embeddings"] = model.core.tied
        text.update({"tie_word_embeddings": model.core.tied} if "tie_word_embeddings" in text else {})
    return content


def _old_rope_fields(content: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the fields that transformers 4 reads instead of `rope_parameters`, by the names of its config class.

    Args:
        content: of config.json.
        names: see `Family.old_rope_names`.
    """
    parameters = content.get("rope_parameters")
    if not parameters:
        return {}
    rope = parameters.get("full_attention", parameters)
    old: dict[str, Any] = {"rope_scaling": _old_scaling(rope, content), "rope_theta": rope["rope_theta"]}
    if "sliding_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    present = {name: names.get(name, name) for name in old}
    return {present[name] or "": value for name, value in old.items() if present[name] is not None}


def _old_scaling(rope: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if content["model_type"] != "phi3":
        return scaling
    # its config in transformers 4 accepts only these three fields; the original length is a field of the config itself
    bare = {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return bare if rope.keys() <= {*PHI3_ELSEWHERE, *bare} else scaling
