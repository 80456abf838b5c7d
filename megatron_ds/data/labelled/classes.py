"""The classes of a model, by name or by number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.errors import DataError, nearest_names, show

_UNNAMED = re.compile(r"LABEL_\d+")


class ClassNumbers:
    """Numbers of the classes that data name.

    Args:
        names: of the model's classes, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        times = Counter(names)
        self._numbers = {name: number for number, name in enumerate(names) if times[name] == 1}

    def find(self, value: Any, place: str) -> int:
        """Return the number of a class, or IGNORE_INDEX.

        Args:
            value: a name, a number, or a number as text, as in CSV files, if no class has that name.
            place: of the value, such as `data.jsonl:7: label`, for errors.

        Raises:
            DataError: the model has no such class, or several.
        """
        if isinstance(value, str) and value in self._numbers:
            return self._numbers[value]
        number = _integer(value)
        if number is not None and (number == IGNORE_INDEX or 0 <= number < len(self._names)):
            return number
        raise DataError(f"data: {place}={show(value)} {self._rule(value, number)}")

    def _rule(self, value: Any, number: int | None) -> str:
        count, names = len(self._names), show(", ".join(self._names))
        if isinstance(value, bool) or (number is None and not isinstance(value, str)):
            return f"is neither the name nor the number of a class; write one of {names}"
        if number is not None:
            hint = "; rows without a label have no place here" if number == -1 else ""
            return (
                f"is no number of a class: the model has {count}, 0 to {count - 1}, and {IGNORE_INDEX} is ignored{hint}"
            )
        if value in self._names:
            numbers = ", ".join(str(number) for number, name in enumerate(self._names) if name == value)
            return f"is the name of several of the model's classes ({numbers}); write the number"
        if all(map(_UNNAMED.fullmatch, self._names)):
            return (
                f"is a name, and the model's {count} classes have none: write numbers, or name them in "
                "model.head={labels: [...]}, which makes a new head"
            )
        nearest = nearest_names(value, self._names)
        return f"is not one of the model's {count} classes ({names}){f'; nearest: {nearest[0]}' if nearest else ''}"


def _integer(value: Any) -> int | None:
    """Return a number without fraction as an integer; None = it is another value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d+", value.strip()) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None
