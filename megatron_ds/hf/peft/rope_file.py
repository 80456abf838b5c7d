"""The rotation of positions that adapters were trained with, if the run file gave the base model another than its own.

peft saves nothing about it: its users pass `rope_parameters` and `max_position_embeddings` when they load the base
model. So a file of its own, which peft does not read, holds the section `model.rope` of the run.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ds.config.rope_section import RopeSection
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.peft.run_sections import read_section
from megatron_ds.hf.rope import with_rope
from megatron_ds.hf.weight_files import json_text

ROPE_FILE = "rope.json"


def rope_file(model: HFModel) -> dict[str, bytes]:
    """Return the file about a model's rotation: name -> content; empty where it is the base model's own."""
    if model.rope is None:
        return {}
    return {ROPE_FILE: json_text(model.rope.model_dump(exclude_none=True)).encode()}


def with_saved_rope(directory: Path, base: HFModel) -> HFModel:
    """Return the base model of adapters with the rotation that they were trained with.

    Args:
        directory: of the adapters.
        base: their base model.

    Raises:
        ConversionError: the file about the rotation is damaged.
        ConfigError: see `with_rope`.
    """
    rope = read_section(directory / ROPE_FILE, RopeSection)
    return base if rope is None else with_rope(base, rope)


def check_same_rope(directory: Path, model: HFModel) -> None:
    """Check that a run's model has the rotation that its adapters were trained with.

    Raises:
        ConversionError: it has another one.
    """
    file = directory / ROPE_FILE
    if not file.is_file():
        return
    try:
        same = with_saved_rope(directory, model).core == model.core
    except ConfigError:  # the model has a third one
        same = False
    if not same:
        raise ConversionError(f"{file} is another rotation than the run's; set model.rope to what it holds")
