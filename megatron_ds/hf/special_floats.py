"""Infinities in JSON. It has no word for them, and transformers writes `{"__float__": "Infinity"}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_TAG = "__float__"
_WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def decode_floats(content: Any) -> Any:
    """Return the content of a JSON file with numbers for the words that stand for them."""
    if isinstance(content, Mapping):
        word = content.get(_TAG)
        if len(content) == 1 and isinstance(word, str) and word in _WORDS:
            return _WORDS[word]
        return {name: decode_floats(value) for name, value in content.items()}
    return [decode_floats(value) for value in content] if isinstance(content, list) else content


def encode_floats(content: Any) -> Any:
    """Return the content of a JSON file with words for the numbers that JSON does not have."""
    if isinstance(content, float) and not math.isfinite(content):
        word = "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
        return {_TAG: word}
    if isinstance(content, Mapping):
        return {name: encode_floats(value) for name, value in content.items()}
    return [encode_floats(value) for value in content] if isinstance(content, (list, tuple)) else content
