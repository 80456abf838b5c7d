"""The families that we read and write, by `model_type`."""

from __future__ import annotations

import difflib

from megatron_ds.errors import ConversionError
from megatron_ds.hf.families.gpt2 import GPT2
from megatron_ds.hf.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_ds.hf.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(model_type: str | None, where: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ConversionError: not supported; names the nearest ones.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.6)
    hint = f"nearest: {nearest[0]}" if nearest else f"supported: {', '.join(FAMILIES)}"
    raise ConversionError(f"{where}: model_type={model_type!r} is not supported; {hint}")
