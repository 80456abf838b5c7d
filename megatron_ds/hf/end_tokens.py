"""End tokens that training data teach, in the settings that `generate` stops by: generation_config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ds.errors import ConversionError, show
from megatron_ds.hf.config import HFModel, read_json
from megatron_ds.hf.weight_files import json_text
from megatron_ds.untrusted import parse_json, read_text
from megatron_ds.untrusted.limits import MODEL_SETTINGS

GENERATION_CONFIG = "generation_config.json"
_FROM_CONFIG = "_from_model_config"  # where it is true, transformers may read the settings from config.json again


def known_end_ids(model: HFModel, model_path: str | Path | None) -> list[int]:
    """Return the ids at which `generate` stops with an export of a model, before training adds any.

    Args:
        model: the model.
        model_path: directory of the model's generation settings; None or no such file = they are made from its config.
    """
    file = Path(model_path) / GENERATION_CONFIG if model_path is not None else None
    if file is not None and file.is_file():
        return _as_list(read_json(file).get("eos_token_id"))
    parts = (model.config, getattr(model.config, "text_config", None))  # in the order of transformers
    return next((ids for part in parts if (ids := _as_list(getattr(part, "eos_token_id", None)))), [])


def with_end_ids(content: str, end_ids: Iterable[int]) -> str:
    """Return the text of generation_config.json with more ids in `eos_token_id`; unchanged if it has all of them."""
    settings = parse_json(content, GENERATION_CONFIG, MODEL_SETTINGS, ConversionError)
    if not isinstance(settings, dict):
        raise ConversionError(f"{GENERATION_CONFIG}: expected a JSON object, not {type(settings).__name__}")
    known = _as_list(settings.get("eos_token_id"))
    every = list(dict.fromkeys([*known, *end_ids]))
    if every == known:
        return content
    settings.pop(_FROM_CONFIG, None)
    return json_text({**settings, "eos_token_id": every if len(every) > 1 else every[0]})


def add_end_ids(directory: Path, end_ids: Sequence[int]) -> None:
    """Add ids to `eos_token_id` of a directory's generation_config.json, if it has that file."""
    file = directory / GENERATION_CONFIG
    if file.is_file():
        content = read_text(file, MODEL_SETTINGS, ConversionError)
        file.write_text(with_end_ids(content, end_ids), encoding="utf-8")


def files_with_end_ids(files: Mapping[str, bytes], end_ids: Sequence[int]) -> dict[str, bytes]:
    """Return a directory's files, path -> content, with ids added to `eos_token_id` of generation_config.json."""
    changed = dict(files)
    if GENERATION_CONFIG in changed:
        changed[GENERATION_CONFIG] = with_end_ids(changed[GENERATION_CONFIG].decode(), end_ids).encode()
    return changed


def _as_list(value: Any) -> list[int]:
    """Return an id, several or none as a list."""
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, int) for one in ids):
        raise ConversionError(f"eos_token_id={show(value)} must be an id, or a list of ids")
    return ids
