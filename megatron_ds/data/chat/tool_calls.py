"""Calls of tools, and declarations of tools, in the forms in which data sets hold them, brought to OpenAI's."""

import json
from collections.abc import Mapping
from typing import Any

from megatron_ds.errors import DataError

_ARGUMENTS = ("arguments", "parameters", "args")


def read_tool_calls(value: object, place: str) -> list[dict[str, Any]]:
    """Return calls as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with their other keys.

    Args:
        value: a call or a list of calls, or either as JSON; None = no calls.
        place: its place, for errors.

    Raises:
        DataError: a call is malformed.
    """
    if isinstance(value, str):
        value = parse_json(value, place) if value.strip() else None
    calls = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [read_call(call, f"{place}[{index}]") for index, call in enumerate(calls)]


def read_call(value: object, place: str) -> dict[str, Any]:
    """Return one call; its arguments may be an object or JSON.

    Raises:
        DataError: the call is malformed.
    """
    if isinstance(value, str):
        value = parse_json(value, place)
    call = _without_nulls(value) if isinstance(value, Mapping) else {}
    function = _without_nulls(call["function"]) if isinstance(call.get("function"), Mapping) else None
    if function is None:  # the call without its envelope
        function = {key: call.pop(key) for key in ("name", *_ARGUMENTS) if key in call}
    if not isinstance(function.get("name"), str):
        raise DataError(f"data: {place} must be a call with the name of a function and arguments, found {value!r:.60}")
    given = next((function.pop(key) for key in _ARGUMENTS if key in function), None)
    arguments = parse_json(given, f"{place}: arguments") if isinstance(given, str) and given.strip() else given or {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"data: {place}: arguments must be an object, or one written as JSON, found {given!r:.60}")
    return {"type": "function", **call, "function": {**function, "arguments": dict(arguments)}}


def read_tools(value: object, where: str) -> list[Any] | None:
    """Return declarations of tools as `{"type": "function", "function": {...}}`; None = no tools.

    Raises:
        DataError: they are no list, nor one written as JSON.
    """
    if isinstance(value, str):  # tables hold structures without fixed columns as JSON
        value = parse_json(value, f"{where}: tools") if value.strip() else None
    if value is not None and not isinstance(value, list | tuple):
        raise DataError(f"data: {where}: tools must be a list, found {type(value).__name__} {str(value)[:40]!r}")
    return [_read_tool(tool, f"{where}: tools[{index}]") for index, tool in enumerate(value or ())] or None


def parse_json(text: str, place: str) -> Any:
    """Return a value written as JSON.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {place} is not JSON ({error})") from error


def _read_tool(value: object, place: str) -> Any:
    if isinstance(value, str):
        value = parse_json(value, place)
    if not isinstance(value, Mapping):
        raise DataError(f"data: {place} must be an object, found {type(value).__name__} {str(value)[:40]!r}")
    if "name" in value and "function" not in value:  # a declaration without its envelope
        return {"type": "function", "function": {key: entry for key, entry in value.items() if key != "type"}}
    return dict(value)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if entry is not None}
