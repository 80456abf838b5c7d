"""A row of a file: its place, and its fields, which are parsed on demand."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row, as the file names its fields.

    Attributes:
        where: file and line, or row, for errors.
        load: returns the fields; raises DataError where the row holds none.
    """

    where: str
    load: Callable[[], Mapping[str, Any]]
