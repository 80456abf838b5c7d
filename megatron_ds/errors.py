"""Types of the errors that a user can cause, and parts of their messages.

The command line turns every `MegatronDSError` into one line on stderr and exit status 2, a `LaunchError` into status 1;
any other exception is a defect of this package and keeps its traceback. Each message names the field, its value, the
rule, and a fix: `nearest:` before the closest value that is allowed, `try` before an action.
"""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

_LONGEST_VALUE = 80
_LONGEST_MESSAGE = 1600
_ODD = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that end a line, that terminals act on, or that no stream can write."""


class MegatronDSError(Exception):
    """Base of all errors that a user can cause and fix.

    The text is one line of limited length, whatever a file holds that it names.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[: _LONGEST_MESSAGE // 2]} ... {text[-_LONGEST_MESSAGE // 4 :]}"
        return text if text.isprintable() else _ODD.sub(lambda odd: odd[0].encode("unicode_escape").decode(), text)


class ConfigError(MegatronDSError):
    """The run file, an override or the DeepSpeed JSON is wrong or contradicts itself."""


class TopologyError(ConfigError):
    """The model, the batch and the number of ranks cannot be divided as asked."""


class ConversionError(MegatronDSError):
    """A Hugging Face directory cannot be read or written without changing its meaning."""


class HubError(ConversionError):
    """A repository on the Hugging Face hub cannot be read or written."""


class CheckpointError(MegatronDSError):
    """A checkpoint is missing, damaged or belongs to another run."""


class DataError(MegatronDSError):
    """Training data is missing, malformed or does not fit the model."""


class TrainingError(MegatronDSError):
    """A run cannot continue: its loss or gradient is not finite."""


class RemoteError(MegatronDSError):
    """Files on an object store or a web server cannot be read or written."""


class LaunchError(MegatronDSError):
    """A rank died, hung or could not be started. The text may have the lines of a traceback."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class HardwareError(LaunchError):
    """A device, its memory or a link has given wrong results."""


def show(value: Any) -> str:
    """Return a value as in YAML or JSON, on one line, shortened and without characters that terminals act on."""
    if isinstance(value, str):
        start = value[: _LONGEST_VALUE + 1]
        is_plain = value.strip() == value and value and start.replace("\n", "").isprintable()
        text = start if is_plain else json.dumps(start)
    elif value is None or isinstance(value, bool | list | tuple | dict):
        try:
            text = json.dumps(value, default=str)
        except (TypeError, ValueError):  # a key that JSON does not have, an integer of thousands of digits
            text = type(value).__name__
    elif isinstance(value, int) and value.bit_length() > 4 * _LONGEST_VALUE:
        text = f"{value:#x}"
    else:
        text = str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def nearest_names(name: str, legal: Iterable[str]) -> list[str]:
    """Return up to three other legal names that look like `name`, the closest first."""
    others = [one for one in legal if one != name]
    return difflib.get_close_matches(name, others, n=3, cutoff=0.6)


def suggest(name: str, legal: Iterable[str], prefix: str = "") -> str:
    """Return `did you mean a or b?`, or the list of legal names if none is near."""
    names = sorted(legal)
    close = nearest_names(name, names)
    if close:
        return "did you mean " + " or ".join(prefix + c for c in close) + "?"
    return "legal here: " + ", ".join(names)


def not_one_of(value: Any, legal: Iterable[str]) -> str:
    """Return `is not one of a, b, c`, followed by the legal name that is most similar to the value, if any is."""
    names = list(legal)
    close = nearest_names(value, names) if isinstance(value, str) else []
    return f"is not one of {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else "")
