"""Kinds of the values of a peft config that a user writes; peft itself checks few of them."""

from collections.abc import Mapping
from typing import Any

from megatron_ds.errors import ConversionError, nearest_names, show

_NUMBER, _INTEGER, _SWITCH = ((int, float), "a number"), ((int,), "an integer"), ((bool,), "true or false")
_NAMES, _MAPPING = ((list, str), "a list of names"), ((dict,), "a mapping from names to numbers")
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "alpha_pattern": _MAPPING,
    "ensure_weight_tying": _SWITCH,
    "exclude_modules": _NAMES,
    "fan_in_fan_out": _SWITCH,
    "feedforward_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": ((list, int), "a list of integers"),
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    "modules_to_save": ((list,), "a list of names"),
    "r": _INTEGER,
    "rank_pattern": _MAPPING,
    "target_modules": _NAMES,
    "target_parameters": ((list,), "a list of names"),
    "trainable_token_indices": ((list, dict), "a list of ids, or a mapping from names to such lists"),
    "use_dora": _SWITCH,
    "use_rslora": _SWITCH,
}
_ITEM: Mapping[str, type] = {"layers_to_transform": int, "trainable_token_indices": int}
"""Field -> the type of the items of its list; the others are texts."""
_OTHER_NAMES: Mapping[str, str] = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
}


def check_kinds(where: str, fields: Mapping[str, Any]) -> None:
    """Check the kinds of values.

    Args:
        where: what errors put before a field's name.
        fields: of a peft config; None is allowed everywhere.

    Raises:
        ConversionError: a value is of another kind, such as a number in quotes.
    """
    for name, value in fields.items():
        if value is None or name not in _KINDS:
            continue
        if not _is_kind(name, value):
            raise ConversionError(f"{where}.{name}={show(value)} is {_text(value)}not {_KINDS[name][1]}{_fix(value)}")
        _check_items(f"{where}.{name}", value, _ITEM.get(name, str))
        if _KINDS[name] is _MAPPING:
            for key, one in value.items():
                if isinstance(one, bool) or not isinstance(one, int | float):
                    raise ConversionError(f"{where}.{name}.{key}={show(one)} is {_text(one)}not a number{_fix(one)}")
        elif isinstance(value, dict):
            for key, one in value.items():
                if not isinstance(one, list):
                    raise ConversionError(f"{where}.{name}.{key}={show(one)} is not a list of ids")
                _check_items(f"{where}.{name}.{key}", one, int)


def _check_items(place: str, value: Any, wanted: type) -> None:
    """Check the types of the items of a value, if it is a list."""
    for number, one in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(one, wanted) or isinstance(one, bool):
            raise ConversionError(f"{place}[{number}]={show(one)} is not {'a name' if wanted is str else 'an integer'}")


def meant_field(name: str, value: Any, known: frozenset[str]) -> str | None:
    """Return the known field that an unknown one means; None if no similar field takes the value."""
    candidates = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else nearest_names(name, known)
    return next((one for one in candidates if one in known and (one not in _KINDS or _is_kind(one, value))), None)


def _is_kind(name: str, value: Any) -> bool:
    types, _ = _KINDS[name]
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _text(value: Any) -> str:
    return "text, " if isinstance(value, str) else ""


def _fix(value: Any) -> str:
    is_quoted = isinstance(value, str) and (value in ("true", "false") or value.replace(".", "", 1).isdigit())
    return "; remove the quotes" if is_quoted else ""
