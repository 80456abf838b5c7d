"""Hugging Face configs, read strictly and written for transformers 4 and 5 alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.family import Family
from megatron_ds.hf.registry import family_of
from megatron_ds.models.config import DecoderConfig


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face model's meaning.

    Attributes:
        family: its table.
        config: transformers' config object, defaults filled in.
        decoder: the same in our terms.
    """

    family: Family
    config: Any
    decoder: DecoderConfig

    def with_tied(self, tied: bool) -> HFModel:
        """The same model with the head tied to the embedding, or not."""
        return replace(self, decoder=replace(self.decoder, tied=tied))


def read_model(source: str | Path | Mapping[str, Any]) -> HFModel:
    """Read a directory's config.json, or a mapping of its fields.

    Raises:
        ConversionError: no config, an unknown family, or a field that changes the math and is not supported.
    """
    where = "model.config" if isinstance(source, Mapping) else str(Path(source) / "config.json")
    raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source) / "config.json")
    family = family_of(raw.get("model_type"), where)
    family.fields.check(raw, where)
    from transformers import AutoConfig

    fields = {name: value for name, value in raw.items() if name != "model_type"}
    try:
        config = AutoConfig.for_model(family.model_type, **fields)
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise ConversionError(f"{where}: transformers refuses it: {reason}") from problem
    decoder = family.translate(config)
    _check_sizes(decoder, where)
    return HFModel(family, config, decoder)


def _check_sizes(decoder: DecoderConfig, where: str) -> None:
    if decoder.num_heads % decoder.num_kv_heads:
        raise ConversionError(
            f"{where}: num_key_value_heads={decoder.num_kv_heads} does not divide num_attention_heads="
            f"{decoder.num_heads}"
        )
    if decoder.rotary is None and decoder.head_dim * decoder.num_heads != decoder.hidden_size:
        raise ConversionError(f"{where}: n_head={decoder.num_heads} does not divide n_embd={decoder.hidden_size}")
    if decoder.rotary is not None and decoder.head_dim % 2:
        raise ConversionError(f"{where}: head_dim={decoder.head_dim} is odd; rotary positions need an even one")


def config_json(model: HFModel, dtype: str) -> dict[str, Any]:
    """config.json's content, with the names of both transformers 4 and 5 where they differ."""
    content: dict[str, Any] = model.config.to_dict()
    content.pop("_name_or_path", None)
    content.update(
        architectures=[model.family.architecture],
        model_type=model.family.model_type,
        tie_word_embeddings=model.decoder.tied,
        dtype=dtype,
        torch_dtype=dtype,
    )
    rope = content.get("rope_parameters")
    if rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        content["rope_theta"] = rope["rope_theta"]
        content["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path.parent}: no config.json here; is it a Hugging Face directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ConversionError(f"{path}: not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object")
    return content
