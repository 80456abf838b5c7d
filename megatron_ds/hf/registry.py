"""The families that we read and write, by `model_type`."""

from __future__ import annotations

import difflib
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.families.gpt2 import GPT2
from megatron_ds.hf.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_ds.hf.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(model_type: Any) -> Family:
    """The family of a config's `model_type`.

    Raises:
        ConversionError: missing or not supported; names the nearest one.
    """
    supported = f"supported: {', '.join(FAMILIES)}"
    if model_type is None:
        raise ConversionError(f"model_type is missing; {supported}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.6)
        hint = f"nearest: {nearest[0]}" if nearest else supported
        raise ConversionError(f"model_type={model_type!r} is not supported; {hint}")
    return FAMILIES[model_type]
