"""The moments at which weights of training data change: after a number of steps, or of tokens."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from megatron_ds.config.schema_base import integral_float_to_int
from megatron_ds.errors import ConfigError, show

_TOKENS = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([KMBT]?)\s*tokens?")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class MixtureStart(NamedTuple):
    """The moment from which a weight holds.

    Attributes:
        step: number of steps that are done before; None = it is given in tokens.
        tokens: number of tokens, padding included, that were read before.
    """

    step: int | None
    tokens: int = 0


def parse_start(key: Any) -> MixtureStart:
    """Parse a key of `data.train[*].weight`: a number of steps, or of tokens such as `2B tokens`.

    Raises:
        ConfigError: it is neither.
    """
    number = integral_float_to_int(key)
    if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
        return MixtureStart(number)
    if isinstance(key, str):
        if key.isascii() and key.isdigit():  # of an override
            return MixtureStart(int(key))
        found = _TOKENS.fullmatch(key.strip())
        if found:
            return MixtureStart(None, round(float(found[1].replace("_", "")) * _UNITS[found[2]]))
    raise ConfigError(
        f"data.train: weight has the key {show(key)}, which is neither a number of steps nor of tokens; write "
        "{0: 0.7, 1000: 0.3} or {0: 0.7, 2B tokens: 0.3}"
    )
