"""Data sets on the hub that are read as a stream: no row is kept on the disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ds.data.readers.row import Row
from megatron_ds.data.readers.source import Source
from megatron_ds.errors import DataError, HubError
from megatron_ds.hub import parse_id, pinned_dataset

DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Stream:
    """A split of a data set on the hub at one commit, whose rows are downloaded as they are read.

    Attributes:
        source: the source that names it.
        commit: the commit of its revision.
    """

    source: Source
    commit: str

    @property
    def name(self) -> str:
        """The source, for messages."""
        return str(self.source)

    @property
    def identity(self) -> str:
        """A text that is another one if any row is, as a commit never changes; part of cache keys."""
        place = parse_id(self.source.path)
        assert place is not None, self.source
        split = self.source.split or DEFAULT_SPLIT
        return f"stream:{place.repo}@{self.commit} {self.source.name or ''} {split}"

    def rows(self, only: Collection[str] | None) -> Iterator[Row]:
        """Yield the rows in order; of their columns, those in `only` (None = all).

        Raises:
            DataError: there is no such configuration or split, or the hub cannot be read any more.
        """
        import datasets

        place, split = parse_id(self.source.path), self.source.split or DEFAULT_SPLIT
        assert place is not None, self.source
        configuration: dict[str, Any] = {} if self.source.name is None else {"name": self.source.name}
        try:
            table = datasets.load_dataset(
                place.repo, revision=self.commit, split=split, streaming=True, **configuration
            )
            names = [name for name in table.column_names or () if only is None or name in only]
            for number, columns in enumerate(table.select_columns(names) if names else table):
                yield Row(f"{self.name}: row {number}", partial(dict, columns))
        except Exception as error:  # the hub client and the readers raise types of several libraries; all are chained
            raise DataError(
                f"data: {self.source.path}: no stream of a {split!r} split "
                f"({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error


def open_stream(source: Source) -> Stream:
    """Find out the commit of a source that is streamed. Without a net, the cached one is taken.

    Raises:
        DataError: it is no data set on the hub, or a part of a split.
        HubError: the hub cannot be read, and the cache does not know the commit.
    """
    place, path = parse_id(source.path), Path(source.path).expanduser()
    if place is None or path.exists():
        raise DataError(
            f"data: {source.path}: streaming=true is for data sets on the hub, such as org/name; remove it: files are "
            "read in pieces anyway"
        )
    if source.split is not None and not source.split.isidentifier():
        raise DataError(
            f"data: {source.path}: split={source.split}: a stream is read from its start to its end; try the name of a "
            "split, such as train"
        )
    try:
        return Stream(source, pinned_dataset(place, f"data: {source.path}"))
    except HubError as problem:
        raise DataError(str(problem)) from problem
