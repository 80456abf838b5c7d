"""Ids of tokens that stand for something else than text, such as a part of an image, and that no text may hold.

They are in the range of the vocabulary, and a model would learn them as words that never come with an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_ds.errors import DataError

_BLOCK = 1 << 22  # ids that are compared at a time


class TokenRows(Protocol):
    """Rows of tokens, one after the other, that know where they are from."""

    @property
    def ids(self) -> np.ndarray:
        """(T,) integers."""

    @property
    def starts(self) -> np.ndarray:
        """(n + 1,) int64: start of each row, and the end of the last."""

    def where(self, index: int) -> str:
        """Return file and line of a row."""


@dataclass(frozen=True)
class Placeholders:
    """The placeholders of a model.

    Attributes:
        ids: field of config.json -> id.
    """

    ids: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.ids)

    @property
    def smallest(self) -> int:
        """The smallest id; data whose ids are below it hold none of them."""
        return min(self.ids.values())

    def find(self, ids: np.ndarray) -> int | None:
        """Return the first position of a placeholder in (T,) ids; None = they hold none."""
        if not self.ids:
            return None
        wanted = np.asarray(list(self.ids.values()))
        for start in range(0, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK]
            if block.max() < self.smallest:
                continue
            found = np.flatnonzero(np.isin(block, wanted))
            if len(found):
                return start + int(found[0])
        return None

    def require_none(self, ids: np.ndarray, where: str | Callable[[int], str]) -> None:
        """Refuse ids that hold a placeholder.

        Args:
            ids: (T,) integers.
            where: file and row of the ids, or a function of the position in them that returns these.

        Raises:
            DataError: naming the first one.
        """
        position = self.find(ids)
        if position is not None:
            raise self.error(int(ids[position]), where if isinstance(where, str) else where(position))

    def require_none_in(self, rows: TokenRows) -> None:
        """Refuse rows of which one holds a placeholder.

        Raises:
            DataError: naming the first one.
        """
        starts = rows.starts
        self.require_none(rows.ids, lambda position: rows.where(int(np.searchsorted(starts, position, "right")) - 1))

    def error(self, token: int, where: str) -> DataError:
        """Return the error of a placeholder in a text."""
        name = next(name for name, value in self.ids.items() if value == token)
        return DataError(
            f"data: {where}: holds the id {token}, which is {name} in the model's config.json and stands for something "
            "else than text; only text is trained on: remove it"
        )


NO_PLACEHOLDERS = Placeholders()
"""Those of a model of text alone."""
