"""A source of examples as a run file names it, before anything is looked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any

from megatron_ds.data.readers.bad_rows import BadRows


@dataclass(frozen=True)
class Source:
    """A source, and how its rows are read.

    Attributes:
        path: a file, a directory, a pattern such as `data/*.jsonl.gz`, a directory saved by `datasets`, a hub id, or
            the prefix of indexed files.
        name: the configuration of a data set on the hub; None = its default.
        split: as `datasets` takes it, such as `train[:10%]`; None = `train` on the hub, and everything elsewhere.
        columns: (our name, name in the data) of each field that is named otherwise in the data.
        skip_bad: leave out rows that hold no usable example, instead of refusing the source.
        streaming: a data set on the hub is read as a stream, and not kept on the disk.
    """

    path: str
    name: str | None = None
    split: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    skip_bad: bool = False
    streaming: bool = False

    def __str__(self) -> str:
        """Return the source as text, for messages."""
        chosen = [f"{key} {value}" for key, value in (("name", self.name), ("split", self.split)) if value is not None]
        return f"{self.path} ({', '.join(chosen)})" if chosen else self.path

    @property
    def identity(self) -> str:
        """A text that changes with every setting that affects usable examples, besides the content of the files; part
        of cache keys. Empty where nothing is set."""
        return "".join(f"columns.{ours}={theirs}\n" for ours, theirs in sorted(self.columns))

    @property
    def prefix(self) -> str:
        """The part of the places of examples that names the source; it is not cached, as data may be moved."""
        path = Path(self.path).expanduser()
        if path.exists():
            return str(path)
        if has_magic(self.path):
            fixed = list(takewhile(lambda part: not has_magic(part), path.parts))
            return str(Path(*fixed)) if fixed else ""
        return str(self)

    def bad_rows(self) -> BadRows:
        """Return an empty account of the rows that are left out."""
        return BadRows(self.skip_bad)

    def rename(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields of a row under our names. A field that the row lacks is left out."""
        if not self.columns:
            return columns
        taken = {theirs for _, theirs in self.columns} | {ours for ours, _ in self.columns}
        renamed = {name: value for name, value in columns.items() if name not in taken}
        for ours, theirs in self.columns:
            found, value = find_field(columns, theirs)
            if found:
                renamed[ours] = value
        return renamed

    def names_of(self, ours: str) -> tuple[str, str]:
        """Return the names of the fields in the data that may hold our field `ours`: itself, or an object with it."""
        theirs = dict(self.columns).get(ours, ours)
        return theirs, theirs.partition(".")[0]


def as_source(given: "str | Source") -> Source:
    """Return a source; a text is its path."""
    return Source(given) if isinstance(given, str) else given


def find_field(columns: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """Return whether a row has a field, and its value; `a.b` is field b of the object in field a, unless a field has
    that very name."""
    if name in columns:
        return True, columns[name]
    value: Any = columns
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value
