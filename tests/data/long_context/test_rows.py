"""Rows cut from documents: every token learned once, long documents by themselves, and the bounds of bands."""

import itertools
from collections import Counter

import numpy as np
import pytest

from megatron_ds.data.long_context.bands import ANY_LENGTH, LengthBand, bands_of
from megatron_ds.data.long_context.rows import Piece, cut_rows

S = 8


def pieces_of(lengths: list[int], band: LengthBand = ANY_LENGTH) -> tuple[list[list[Piece]], int]:
    """The pieces of every row, and how many of the rows hold one document."""
    rows = cut_rows(np.asarray(lengths), band, S)
    return [list(rows.pieces(row, S)) for row in range(rows.count(S))], rows.num_whole


def test_rows_by_hand() -> None:
    found, whole = pieces_of([3, 17, 9, 8, 1, 12])
    assert whole == 4, "17 is two rows and the last target, 9 and 12 are one each"
    assert found[:4] == [[(1, 0, 9)], [(1, 8, 9)], [(2, 0, 9)], [(5, 0, 9)]]
    assert found[4:] == [[(0, 0, 3), (3, 0, 6)]], "the rests of 17 and of 9 are targets already"
    assert pieces_of([3, 17, 9, 8, 2, 13])[0][4:] == [[(0, 0, 3), (3, 0, 6)], [(3, 5, 3), (4, 0, 2), (5, 8, 4)]]
    assert pieces_of([3, 17, 9, 8, 3, 13])[0][4:] == [[(0, 0, 3), (3, 0, 6)], [(3, 5, 3), (4, 0, 3), (5, 8, 3)]]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_a_target_once(seed: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = chance.integers(0, 5 * S, size=40).tolist()
    found, whole = pieces_of(lengths)
    learned: Counter[tuple[int, int]] = Counter()
    for number, row in enumerate(found):
        tokens = [(piece.document, piece.offset + place) for piece in row for place in range(piece.length)]
        assert len(tokens) == S + 1
        assert (len({document for document, _ in tokens}) == 1) or number >= whole
        learned.update(
            token
            for (document, place), token in itertools.pairwise(tokens)
            if token[1] == 0 or token == (document, place + 1)
        )
        for (document, place), (after, following) in itertools.pairwise(tokens):
            inside = after == document and following == place + 1
            assert inside or place == lengths[document] - 1, "a document is left at its end alone"
    assert set(learned.values()) == {1}
    every = {(document, place) for document, length in enumerate(lengths) for place in range(length)}
    missing = every - set(learned)
    firsts = {(document, 0) for document, length in enumerate(lengths) if length > S}
    assert firsts <= missing and len(missing - firsts) <= 1 + S, "else the first packed token, and the end of them"


def test_the_longest_stretch_of_a_long_document_is_a_whole_row() -> None:
    for length in range(S + 1, 2 * S + 1):
        (row, *_), whole = pieces_of([S - 1, length, S - 1])
        assert whole == 1 and row == [(1, 0, S + 1)]


def test_bands_meet_and_leave_out_only_what_is_shorter() -> None:
    bands = bands_of({16: 0.5, 4: 0.2, 64: 0.3})
    assert bands == {LengthBand(4, 16): 0.2, LengthBand(16, 64): 0.5, LengthBand(64): 0.3}
    lengths = np.asarray([3, 4, 15, 16, 63, 64, 65])
    documents = [cut_rows(lengths, band, 2) for band in bands]
    assert [one.counts.tolist() for one in documents] == [[2, 19], [2, 79], [2, 129]]
    assert [str(band) for band in bands] == [
        "documents of 4 to 15 tokens",
        "documents of 16 to 63 tokens",
        "documents of 64 tokens or more",
    ]
    assert str(LengthBand(0, 4096)) == "documents of less than 4,096 tokens" and str(ANY_LENGTH) in str(LengthBand())
