"""The datasets that a dataset is made of, and what they have in common."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from megatron_ds.data.dataset import Dataset


@runtime_checkable
class Composite(Protocol):
    """A dataset made of others, such as a blend."""

    @property
    def parts(self) -> Sequence[tuple[str, Dataset]]:
        """(name of the source, dataset) of each part; an empty name is that of the whole."""


@runtime_checkable
class Ending(Protocol):
    """A dataset whose samples teach the model to end its text."""

    @property
    def ends(self) -> Mapping[int, str]:
        """Special ids that are learned as an end, with their texts."""


@runtime_checkable
class Beginning(Protocol):
    """A dataset whose documents may begin with special tokens."""

    @property
    def begin_ids(self) -> Sequence[int]:
        """Special ids before each document."""


def parts_of(data: Dataset, name: str = "") -> Iterator[tuple[str, Dataset]]:
    """Yield the datasets that a dataset is made of, with the names of their sources; itself if it has no parts.

    Args:
        data: the dataset.
        name: of its sources.
    """
    if not isinstance(data, Composite):
        yield name, data
        return
    for part_name, part in data.parts:
        yield from parts_of(part, part_name or name)


def ends_of(data: Dataset) -> dict[int, str]:
    """Return the special ids that a dataset teaches as an end, with their texts."""
    return {token: text for _, part in parts_of(data) if isinstance(part, Ending) for token, text in part.ends.items()}


def begins_documents(data: Dataset) -> bool:
    """Return whether documents of a dataset begin with special tokens."""
    return any(bool(part.begin_ids) for _, part in parts_of(data) if isinstance(part, Beginning))
