"""Wording of config errors: pydantic's errors as one line of field, value, rule and fix."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_ds.config.unknown_keys import dotted, explain_unknown_key
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.errors import ConfigError, not_one_of, show

_EXAMPLES: Mapping[str, str] = {
    "data.train": "data: {train: [corpus.txt]}",
    "train.steps": "train: {steps: 1000}",
    "output": "output: out/run",
    "export.path": "export: {path: out/hf}",
    "train.ema": "train: {ema: {decay: 0.999}}",
    "train.batch_ramp": "train: {batch_ramp: {start: 32, increment: 32, samples: 100000}}",
    "train.length_ramp": "train: {length_ramp: {start: 64, steps: 10000}}",
}
_MAIN_KEYS: Mapping[str, str] = {
    "model": "path",
    "data": "train",
    "export": "path",
    "optimizer": "name",
    "schedule": "name",
}
"""Section -> the key that a text in the section's place stands for."""


_KEY = "[key]"  # pydantic's last part of the location of a key that is wrong itself


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the most useful of pydantic's errors as one line: field, value, rule, fix. Unknown keys come first."""
    errors = sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["loc"][-1:] != (_KEY,)))
    first = errors[0]
    if first["loc"][-1:] == (_KEY,):
        section = dotted(tuple(part for part in first["loc"][:-2] if not str(part).startswith("dict[")))
        return f"{section} has the key {show(first['input'])}, which is not a name; put it in quotes"
    place, value = dotted(first["loc"]), first["input"]
    example = f", for example {_EXAMPLES[place]}" if place in _EXAMPLES else ""
    if first["type"] == "extra_forbidden":
        return explain_unknown_key(first["loc"], value, model)
    if first["type"] == "missing":
        return f"{place} is missing{'; add it' if example else ''}{example}"
    if first["type"] == "invalid_key":
        return f"{dotted(first['loc'][:-1])} has the key {show(value)}, which is not a name; write key: value"
    if value is None:
        wanted = _WANTED.get(first["type"], "a value")
        return f"{place} is empty; give it {wanted}{example or ', or remove the key'}"
    return f"{place}={show(value)} {_rule(first, place)}"


_WANTED: Mapping[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


def _one_of(ctx: Mapping[str, Any], value: Any) -> str:
    return not_one_of(value, [word.strip("'") for word in str(ctx["expected"]).replace(" or ", ", ").split(", ")])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _not_an_integer(ctx: Mapping[str, Any], value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"is not an integer; nearest: {math.floor(value)} or {math.ceil(value)}"
    return _not_a("an integer", value)


def _not_a_number(ctx: Mapping[str, Any], value: Any) -> str:
    return _not_a("a number", value)


def _not_a(kind: str, value: Any) -> str:
    if isinstance(value, list | dict):
        return f"is a {'list' if isinstance(value, list) else 'mapping'}, not {kind}"
    if not isinstance(value, str):
        return f"is not {kind}"
    if _is_number(value):
        return f"is text, not {kind}; remove the quotes"
    meant = _meant_number(value.strip(), integer=kind == "an integer")
    return f"is not {kind}" + (f"; write {meant}" if meant else "")


def _is_number(text: str) -> bool:
    try:
        value = parse_yaml(text, "")
    except ConfigError:
        return False
    return isinstance(value, int | float) and not isinstance(value, bool)


_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def _meant_number(text: str, *, integer: bool) -> str | None:
    """Return the number that a text with a comma, a per cent sign or a suffix means; None if it has none of them."""
    if re.fullmatch(r"[-+]?[1-9][0-9]{0,2}(,[0-9]{3})+", text):
        grouped = text.replace(",", "")
        return grouped if integer or text.count(",") > 1 else f"{grouped} or {text.replace(',', '.')}"
    if re.fullmatch(r"[-+]?[0-9]*,[0-9]+([eE][-+]?[0-9]+)?", text) and not integer:
        return f"{text.replace(',', '.')}, with a decimal point"
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([%kKmMgGbB])", text)
    if match is None:
        return None
    number, suffix = float(match[1]), match[2].lower()
    if suffix == "%":
        return None if integer else f"{number / 100:g}"
    return f"{number * _SUFFIXES[suffix]:.0f}"


_TIME = re.compile(r"(?P<count>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>s|sec|m|min|h)")
_CLOCK = re.compile(r"(?:(?P<hours>[0-9]+):)?(?P<minutes>[0-9]+):(?P<seconds>[0-9]{2})")
_UNIT_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def _meant_seconds(text: str) -> str | None:
    """Return the seconds that `5m`, `1h` or `0:05:00` mean; None for any other text."""
    if match := _TIME.fullmatch(text):
        return f"{float(match['count']) * _UNIT_SECONDS[match['unit']]:g}"
    if match := _CLOCK.fullmatch(text):
        return str((int(match["hours"] or 0) * 60 + int(match["minutes"])) * 60 + int(match["seconds"]))
    return None


# ---- other types -----------------------------------------------------------------------------------------------------

_SWITCHES = {"yes": "true", "on": "true", "y": "true", "1": "true"} | dict.fromkeys(("no", "off", "n", "0"), "false")


def _not_a_switch(ctx: Mapping[str, Any], value: Any) -> str:
    word = str(value).strip().lower()
    if isinstance(value, str) and word in ("true", "false"):
        return f"is text, not true or false; {'remove the quotes' if value in ('true', 'false') else f'write {word}'}"
    return "is not true or false" + (f"; nearest: {_SWITCHES[word]}" if word in _SWITCHES else "")


def _not_text(ctx: Mapping[str, Any], value: Any) -> str:
    return "is not text" if isinstance(value, list | dict) else "is not text; put it in quotes"


def _not_a_mapping(place: str, value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return "is a list, not a mapping; remove the dashes or brackets around its keys"
    if value is True and place in _MAIN_KEYS:
        return f"is not a mapping; write {place}: {{{_MAIN_KEYS[place]}: ...}}"
    if isinstance(value, str) and place in _MAIN_KEYS:
        return f"is not a mapping; write {place}: {{{_MAIN_KEYS[place]}: {value}}}"
    return f"is not a mapping; write {_EXAMPLES.get(place, '{key: value}')}"


_Rule = Callable[[Mapping[str, Any], Any], str]

_RULES: Mapping[str, _Rule] = {
    "int_type": _not_an_integer,
    "float_type": _not_a_number,
    "bool_type": _not_a_switch,
    "string_type": _not_text,
    "list_type": lambda ctx, value: f"is not a list; write [{value if isinstance(value, str) else 'a, b'}]",
    "finite_number": lambda ctx, value: "is not finite",
    "literal_error": _one_of,
    "greater_than": lambda ctx, value: f"must be more than {ctx['gt']}",
    "greater_than_equal": lambda ctx, value: f"must be at least {ctx['ge']}; nearest: {ctx['ge']}",
    "less_than": lambda ctx, value: f"must be less than {ctx['lt']}",
    "less_than_equal": lambda ctx, value: f"must be at most {ctx['le']}; nearest: {ctx['le']}",
    "too_short": lambda ctx, value: "is empty; give at least one",
    "string_too_short": lambda ctx, value: "is empty",
    "string_pattern_mismatch": lambda ctx, value: "is not a size; write for example 5GB or 500MB",
    "path": lambda ctx, value: str(ctx["rule"]),
}


def _rule(error: Mapping[str, Any], place: str) -> str:
    value = error["input"]
    if place.endswith("_timeout") and isinstance(value, str) and (seconds := _meant_seconds(value.strip().lower())):
        return f"is not a number of seconds; write {seconds}"
    if place == "export.max_shard_size" and isinstance(value, int | float):
        return "is not a size; write for example 5GB or 500MB"
    if error["type"] in ("dict_type", "model_type"):
        return _not_a_mapping(place, error["input"])
    rule = _RULES.get(error["type"])
    if rule is None:
        return f"is refused: {error['msg']}"
    return rule(error.get("ctx", {}), error["input"])
