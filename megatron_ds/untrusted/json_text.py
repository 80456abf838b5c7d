"""JSON within limits: size, depth, number of values, digits and lengths; a repeated key is an error.

Python's parser is safe but generous: it takes as much memory as a text asks for, 20 times its size for nested lists.
Depth and number of values are therefore counted before it runs, at a few hundred MB a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_ds.errors import show
from megatron_ds.untrusted.files import ErrorType, read_bytes
from megatron_ds.untrusted.limits import Limits

_TEXTS = re.compile(r'"[^"]*"?')
_BRACKETS = re.compile(r"[\[\]{}]")
_CHANGE_OF_DEPTH = {"[": 1, "{": 1, "]": -1, "}": -1}
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_DIGITS = 40


class _Refused(ValueError):
    """A rule that a text breaks; the message follows its place."""


def read_json(path: Path, limits: Limits, error: ErrorType) -> Any:
    """Return the value in a JSON file.

    Raises:
        error: the file cannot be read (`read_bytes`), or see `parse_json`.
    """
    return parse_json(read_json_text(path, limits, error), str(path), limits, error)


def read_json_text(path: Path, limits: Limits, error: ErrorType) -> str:
    """Return the text of a file that should be JSON, which is UTF-8."""
    return json_text(read_bytes(path, limits, error), str(path), error)


def json_text(content: bytes, place: str, error: ErrorType) -> str:
    """Return bytes that should be JSON as text."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{place}: not JSON ({problem})") from problem


def parse_json(text: str, place: str, limits: Limits, error: ErrorType) -> Any:
    """Return the value that a JSON text holds. NaN and Infinity are numbers, as Python writes them.

    Args:
        text: the text.
        place: its name in errors, such as a file name.
        limits: of its kind.
        error: the type of the error.

    Raises:
        error: not JSON, a repeated key, or more than the limits allow.
    """
    try:
        _check_structure(text, limits)
        value = json.loads(text, object_pairs_hook=_unique, parse_int=partial(_integer, limits))
        if len(text) > limits.max_characters or _HALF_PAIR.search(text):
            _check_texts(value, limits)
    except _Refused as problem:
        raise error(f"{place}: {problem}") from problem
    except (json.JSONDecodeError, RecursionError) as problem:
        raise error(f"{place}: not JSON ({problem})") from problem
    return value


def _check_structure(text: str, limits: Limits) -> None:
    """Refuse a text that is too long, too deep, or has too many values, before it is parsed."""
    if len(text) > limits.max_bytes:
        raise _Refused(f"longer than the {limits.max_bytes:,} characters that {limits.name} may have; {limits.fix}")
    openings = text.count("[") + text.count("{")
    if openings <= limits.max_depth and openings + text.count(",") <= limits.max_values:
        return
    bare = _TEXTS.sub("", text.replace("\\\\", "").replace('\\"', ""))
    num_values = bare.count("[") + bare.count("{") + bare.count(",")
    if num_values > limits.max_values:
        raise _Refused(
            f"{num_values:,} values, more than the {limits.max_values:,} that {limits.name} may have; {limits.fix}"
        )
    changes = (_CHANGE_OF_DEPTH[bracket] for bracket in _BRACKETS.findall(bare))
    if max(accumulate(changes), default=0) > limits.max_depth:
        raise _Refused(f"nested deeper than the {limits.max_depth} levels that {limits.name} may have; {limits.fix}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"key {show(repeated)} is given twice in one mapping; keep one")
    return mapping


def _integer(limits: Limits, digits: str) -> int:
    value = int(digits) if len(digits) <= _MOST_DIGITS else None
    if value is None or abs(value) > limits.max_integer:
        raise _Refused(f"{show(digits)} is larger than an integer may be, {limits.max_integer}; {limits.fix}")
    return value


def _check_texts(value: Any, limits: Limits) -> None:
    """Refuse texts that are too long, and those that no encoding can write."""
    for text in _texts(value):
        if len(text) > limits.max_characters:
            raise _Refused(
                f"a text of {len(text):,} characters, more than the {limits.max_characters:,} that {limits.name} "
                f"may have: {show(text)}; {limits.fix}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise _Refused(f"{show(text)} is not text: half of a surrogate pair; {limits.fix}") from problem


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts and keys in a value."""
    unseen = [value]
    while unseen:
        one = unseen.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
            unseen.extend(one.values())
        elif isinstance(one, list):
            unseen.extend(one)
