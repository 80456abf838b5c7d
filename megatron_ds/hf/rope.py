"""Another rotation of positions for a model, so that it can be trained on longer texts: the run file's `model.rope`.

The config that results is one that transformers reads: checkpoints and exports have it, and need nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

from megatron_ds.config.rope_section import RopeSection
from megatron_ds.errors import ConfigError, ConversionError, show
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.log import log_once
from megatron_ds.models.config import ModelConfig

FULL = "full_attention"
"""Kind of layers that is stretched where each kind has a rotation: layers with windows see no distance beyond them."""
ORIGINAL, LONGEST = "original_max_position_embeddings", "max_position_embeddings"
KEEPS_ORIGINAL = ("llama3", "yarn", "longrope")
"""Types whose parameters have the length before stretching."""
KEPT = ("rope_theta", "partial_rotary_factor")
REPLACED = frozenset(("rope_type", "type", ORIGINAL)) | RopeSection.model_fields.keys()


def with_rope(model: HFModel, rope: RopeSection) -> HFModel:
    """Return the model with another rotation of positions; itself if it already has this one.

    Of a model with a rotation for each kind of layer, the layers with full attention get it.

    Args:
        model: the model as it is on disk.
        rope: the rotation.

    Raises:
        ConfigError: the model has no rotation that transformers can replace, it is stretched already, or a value does
            not fit the model.
    """
    current = _parameters(model)
    if _is(rope, current, model.config):
        return replace(model, rope=rope)
    original, longest = _lengths(rope, current, model.config)
    wanted = {name: current[name] for name in KEPT if name in current} | rope.parameters
    if rope.rope_theta is not None:
        wanted["rope_theta"] = rope.rope_theta
    if rope.type in KEEPS_ORIGINAL:
        wanted[ORIGINAL] = original
    config = deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, FULL: wanted} if FULL in config.rope_parameters else wanted
    config.max_position_embeddings = longest
    if hasattr(config, ORIGINAL):
        config.original_max_position_embeddings = original
    try:
        core = _translated(model, model.family.transformers_config(config.to_dict()))  # it checks values first
    except ConversionError as problem:
        raise ConfigError(_in_words_of_the_run_file(problem)) from problem
    stretched = f", {original} positions to {longest}" if longest != original else ""
    log_once(f"model.rope: {rope.type}{stretched}; config.json of checkpoints and exports has it")
    return replace(model, config=config, core=core, rope=rope)


def _in_words_of_the_run_file(problem: ConversionError) -> str:
    """Return an error that names `model.rope.factor` where it has `rope_parameters.factor`."""
    fields = re.sub(rf"\brope_parameters\.({FULL}\.)?", "model.rope.", str(problem))
    return fields if fields.startswith("model.rope.") else f"model.rope: {fields}"


def _parameters(model: HFModel) -> Mapping[str, Any]:
    """Return the `rope_parameters` of the layers with full attention.

    Raises:
        ConfigError: the model has none, or some that cannot be kept.
    """
    name = model.family.model_type
    if model.family.passes_through:
        raise ConfigError(f"model.rope is not supported in a {name}, which is more than a text model; remove it")
    parameters = getattr(model.config, "rope_parameters", None)
    if not parameters or not any(any(stack.rotary) for stack in model.core.stacks.values()):
        raise ConfigError(
            f"model.rope: this {name} has no rotation of positions that config.json can change; remove it"
        )
    if FULL in parameters and FULL not in getattr(model.config, "layer_types", (FULL,)):
        raise ConfigError(f"model.rope is for layers with full attention, and this {name} has none; remove it")
    found: Mapping[str, Any] = parameters.get(FULL, parameters)
    others = [key for key in found if key not in (*REPLACED, *KEPT)]
    if others:
        raise ConfigError(
            f"model.rope cannot keep rope_parameters.{others[0]}={show(found[others[0]])} of this {name}; remove it"
        )
    return found


def _is(rope: RopeSection, current: Mapping[str, Any], config: Any) -> bool:
    """Test whether a model already has this rotation."""
    lengths = {ORIGINAL: current.get(ORIGINAL), LONGEST: config.max_position_embeddings}
    there = {**lengths, "rope_theta": current["rope_theta"]}
    named = {key: value for key, value in rope.given.items() if key in there}
    own = {key: value for key, value in current.items() if key not in (*KEPT, "type", ORIGINAL) and value is not None}
    return own == rope.parameters and all(there[key] == value for key, value in named.items())


def _lengths(rope: RopeSection, current: Mapping[str, Any], config: Any) -> tuple[int, int]:
    """Return the length that is stretched and the length afterwards, in positions.

    Raises:
        ConfigError: the model is stretched already, and the run file does not say which length is; or the length
            afterwards is less.
    """
    kind, original = current.get("rope_type", "default"), rope.original_max_position_embeddings
    if original is None and kind != "default":
        raise ConfigError(
            f"model.rope.type={rope.type} would take the place of the model's own rope_type={kind}, factor="
            f"{show(current.get('factor'))}; if so, give the length that is stretched; nearest: "
            f"model.rope.{ORIGINAL}={current.get(ORIGINAL, config.max_position_embeddings)}"
        )
    original = original or config.max_position_embeddings
    factor = 1.0 if rope.type == "dynamic" else rope.factor or 1.0
    longest = rope.max_position_embeddings or int(original * factor)
    if longest < original:
        raise ConfigError(
            f"model.rope.{LONGEST}={longest} is less than the {original} positions of the model; nearest: {original}"
        )
    return original, longest


def _translated(model: HFModel, config: Any) -> ModelConfig:
    """Return the translation of the model with what another config changes in it; its heads stay."""
    translate = FAMILIES[model.family.model_type].translate
    before, after = translate(model.config), translate(config)
    both = ((field.name, getattr(before, field.name), getattr(after, field.name)) for field in fields(after))
    return replace(model.core, **{name: new for name, old, new in both if new != old})
