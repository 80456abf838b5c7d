"""Documents of uneven length: each in a sequence of its own, and several in one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.parity.cases import SEQ, VOCAB, shifted

Document = tuple[Tensor, Tensor]
"""ids and labels aligned with them, (L,) each."""


@dataclass(frozen=True)
class Rows:
    """What shares a sequence: for each row its documents, which leave some of it empty."""

    rows: tuple[tuple[Document, ...], ...]
    length: int = SEQ

    @property
    def documents(self) -> list[Document]:
        return [document for row in self.rows for document in row]


def draw_rows(count: int, seed: int, length: int = SEQ) -> Rows:
    """Rows of 1 to 8 documents; some have few labels, one has none, one has a single token."""
    generator = torch.Generator().manual_seed(4000 + seed)
    rows = []
    for row in range(count):
        lengths, left = [], length - row % 3
        while left > 0:
            lengths.append(min(left, int(torch.randint(1, 5 + 3 * (row % 5), (1,), generator=generator))))
            left -= lengths[-1]
        rows.append(tuple(_document(size, len(rows) + number, generator) for number, size in enumerate(lengths)))
    return Rows(tuple(rows), length)


def _document(length: int, number: int, generator: torch.Generator) -> Document:
    ids = torch.randint(0, VOCAB, (length,), generator=generator)
    labels = ids.clone()
    labels[: number * 3 % (length + 1)] = -100
    return ids, labels


def unpacked(rows: Rows) -> dict[str, Tensor]:
    """(N, S): a document a row, in transformers' words."""
    ids = torch.stack([_filled(ids, 0, rows.length) for ids, _ in rows.documents])
    labels = torch.stack([_filled(labels, -100, rows.length) for _, labels in rows.documents])
    return {"input_ids": ids, "labels": labels}


def packed(rows: Rows) -> dict[str, Tensor]:
    """(G, S): ours, several documents a row."""
    columns = [_packed_row(row, rows.length) for row in rows.rows]
    return {name: torch.stack([row[name] for row in columns]) for name in columns[0]}


def _packed_row(row: tuple[Document, ...], length: int) -> dict[str, Tensor]:
    ids = torch.cat([ids for ids, _ in row])
    targets = torch.cat([shifted(labels[None])[0] for _, labels in row])
    places = torch.cat([torch.arange(len(ids)) for ids, _ in row])
    tail = torch.arange(length - len(ids))
    return {
        "input_ids": _filled(ids, 0, length),
        "targets": _filled(targets, -100, length),
        "position_ids": torch.cat([places, tail]),
    }


def _filled(values: Tensor, filler: int, length: int) -> Tensor:
    return torch.cat([values, values.new_full((length - len(values),), filler)])
