"""Check of the values of a registered entry's options against the types in its signature."""

import json
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from megatron_ds.config.error_messages import explain
from megatron_ds.errors import ConfigError


def check_option_values(entry: Callable[..., Any], options: Mapping[str, Any], field: str) -> None:
    """Check the types of options that an entry takes by name.

    Those without an annotation may have any value, and those with one that is not known when the program runs. A list
    may stand for a tuple, and a text for a path, since a run file has no others.

    Args:
        entry: the entry, which is called as `entry(..., **options)`.
        options: the options that the user wrote, whose names are known to be right.
        field: the run file's key of the options, such as `schedule.options`.

    Raises:
        ConfigError: a value is of another type, or outside of its bounds.
    """
    fields: dict[str, Any] = {
        name: (
            Any if one.annotation is Parameter.empty or isinstance(one.annotation, str) else one.annotation,
            ... if one.default is Parameter.empty else one.default,
        )
        for name, one in _signature(entry).parameters.items()
        if one.kind is Parameter.KEYWORD_ONLY
    }
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    model = create_model("Options", __config__=config, **fields)
    try:
        model.model_validate_json(json.dumps({name: value for name, value in options.items() if name in fields}))
    except ValidationError as error:
        raise ConfigError(f"{field}.{explain(error, model)}") from None


def _signature(entry: Callable[..., Any]) -> Signature:
    """Return a signature, with annotations as text if one of them names what only type checkers import."""
    try:
        return signature(entry, eval_str=True)
    except NameError:
        return signature(entry)
