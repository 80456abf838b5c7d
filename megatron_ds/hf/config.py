"""Hugging Face configs, read strictly and written for transformers 4 and 5 alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.family import HEAD, Family, Row, axis_sizes
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

    @cached_property
    def table(self) -> dict[str, Row]:
        """Native name -> row, one a parameter of the model: no head where it is tied."""
        table = self.family.table(self.decoder)
        if self.decoder.tied:
            del table[HEAD]
        return table

    @cached_property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the named axes of `table`."""
        return axis_sizes(self.decoder)


def read_model(source: str | Path | Mapping[str, Any]) -> HFModel:
    """Read a directory's config.json, or a mapping of its fields, which is not changed.

    Raises:
        ConversionError: no config, an unknown family, or a field that changes the math and is not supported.
    """
    if isinstance(source, Mapping):
        where, raw = "model.config", deepcopy(dict(source))
    else:
        where, raw = str(Path(source) / "config.json"), _read_json(Path(source) / "config.json")
    try:
        family = family_of(raw.get("model_type"))
        family.fields.check(raw)
        config = _transformers_config(raw)
        decoder = family.translate(config)
        _check_heads(decoder)
    except ConversionError as problem:
        raise ConversionError(f"{where}: {problem}") from problem.__cause__
    return HFModel(family, config, decoder)


def _transformers_config(raw: Mapping[str, Any]) -> Any:
    """transformers' object: its defaults, its old names understood, its own checks."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**raw)
    except Exception as problem:  # transformers and huggingface_hub raise types of their own, KeyError among them
        reason = " ".join(str(problem.args[0] if problem.args else problem).split())
        raise ConversionError(f"transformers refuses it: {reason}") from problem


def _check_heads(decoder: DecoderConfig) -> None:
    if decoder.num_heads % decoder.num_kv_heads:
        raise ConversionError(
            f"num_key_value_heads={decoder.num_kv_heads} does not divide num_attention_heads={decoder.num_heads}"
        )
    if decoder.positions is not None and decoder.head_dim * decoder.num_heads != decoder.hidden_size:
        raise ConversionError(f"n_head={decoder.num_heads} does not divide n_embd={decoder.hidden_size}")


def config_json(model: HFModel, dtype: str) -> dict[str, Any]:
    """config.json's content, with the names of both transformers 4 and 5 where they differ.

    Everything of the model itself is written out, defaults too: the two versions do not have the same ones. What any
    config has at its default (labels, outputs) is left out, and so is what points to code that is not carried.
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
    except (FileNotFoundError, NotADirectoryError):
        raise ConversionError(f"{path.parent}: no config.json here; is it a Hugging Face directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ConversionError(f"{path}: not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content
