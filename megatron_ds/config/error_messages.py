"""Wording of config errors: nearest legal keys, and pydantic's errors as one line."""

import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megatron_ds.errors import nearest_names, not_one_of, show, suggest

_EXAMPLES: Mapping[str, str] = {
    "data.train": "data: {train: [corpus.txt]}",
    "train.steps": "train: {steps: 1000}",
    "output": "output: out/run",
    "export.path": "export: {path: out/hf}",
}


def legal_keys(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Return {dotted section: its keys} of a model and of the models inside it; the top is ""."""
    keys = {prefix: list(model.model_fields)}
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            keys.update(legal_keys(inner, f"{prefix}.{name}" if prefix else name))
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the most useful of pydantic's errors as one line: field, value, rule, fix. Unknown keys come first."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    place = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_key(first["loc"], model)
    if first["type"] == "missing":
        example = f"; add it, for example {_EXAMPLES[place]}" if place in _EXAMPLES else ""
        return f"{place} is missing{example}"
    return f"{place}={show(first['input'])} {_rule(first)}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def _unknown_key(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    section = ".".join(str(part) for part in loc[:-1] if isinstance(part, str))
    prefix, name = _dotted(loc[:-1]), str(loc[-1])
    sections = legal_keys(model)
    legal = sections[section]
    if not nearest_names(name, legal):
        homes = [f"{home}.{name}" if home else name for home, keys in sections.items() if name in keys]
        if homes:
            return f"{_dotted(loc)}: unknown key; did you mean {' or '.join(homes)}?"
    return f"{_dotted(loc)}: unknown key; {suggest(name, legal, f'{prefix}.' if prefix else '')}"


def _one_of(ctx: Mapping[str, Any], value: Any) -> str:
    return not_one_of(value, [word.strip("'") for word in str(ctx["expected"]).replace(" or ", ", ").split(", ")])


def _not_a(kind: str, value: Any) -> str:
    if isinstance(value, str) and value.replace(".", "", 1).isdigit():
        return f"is text, not {kind}; remove the quotes"
    return f"is not {kind}"


_Rule = Callable[[Mapping[str, Any], Any], str]

_RULES: Mapping[str, _Rule] = {
    "int_type": lambda ctx, value: _not_a("an integer", value),
    "float_type": lambda ctx, value: _not_a("a number", value),
    "bool_type": lambda ctx, value: "is not true or false",
    "string_type": lambda ctx, value: (
        "is not text" if value is None or isinstance(value, list | dict) else "is not text; put it in quotes"
    ),
    "list_type": lambda ctx, value: "is not a list; write [a, b]",
    "dict_type": lambda ctx, value: "is not a mapping; write {key: value}",
    "model_type": lambda ctx, value: "is not a mapping; write {key: value}",
    "finite_number": lambda ctx, value: "is not finite",
    "literal_error": _one_of,
    "greater_than": lambda ctx, value: f"must be more than {ctx['gt']}",
    "greater_than_equal": lambda ctx, value: f"must be at least {ctx['ge']}; nearest: {ctx['ge']}",
    "less_than": lambda ctx, value: f"must be less than {ctx['lt']}",
    "too_short": lambda ctx, value: "is empty; give at least one",
    "string_too_short": lambda ctx, value: "is empty",
    "string_pattern_mismatch": lambda ctx, value: "is not a size; write for example 5GB or 500MB",
}


def _rule(error: Mapping[str, Any]) -> str:
    rule = _RULES.get(error["type"])
    if rule is None:
        return f"is refused: {error['msg']}"
    return rule(error.get("ctx", {}), error["input"])
