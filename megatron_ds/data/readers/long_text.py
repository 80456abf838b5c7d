"""Tokenizing a document of any length in bounded memory: in overlapping windows, spliced where they agree.

A tokenizer's encoding takes about 500 bytes per token, so that a document of ten million tokens would take 5 GB in one
piece. Here windows of WINDOW characters that overlap are encoded by themselves. The text at the edge of a window may be
split otherwise than in the whole document; tokenizers work locally, so that the effect ends after a word or two. Each
window is therefore continued by the next from a token on that lies in the middle of their overlap, if both have the
same tokens, of the same characters, throughout that middle. Where they differ, as in a word of thousands of letters,
both windows are encoded as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

WINDOW = 1 << 18  # characters
OVERLAP = 1 << 12
GUARD = 1 << 10  # characters at both ends of an overlap that need not agree


@dataclass(frozen=True)
class _Window:
    """Tokens of characters [start, stop) of a document.

    Attributes:
        start, stop: characters.
        ids: (T,) int64.
        encoding: of the backend.
    """

    start: int
    stop: int
    ids: np.ndarray
    encoding: Encoding

    def tokens(self, first: int, stop: int) -> tuple[range, list[tuple[int, int]]]:
        """Return the tokens from that of character `first` to that of character `stop`, and the characters of each."""
        begin, end = (self._token_at(character, stop) for character in (first, stop))
        spans = [self.encoding.token_to_chars(token) for token in range(begin, end)]
        return range(begin, end), [(self.start + span[0], self.start + span[1]) for span in spans if span is not None]

    def _token_at(self, character: int, last: int) -> int:
        """Return the token of a character, or of the next that has one; a space between words may have no token."""
        places = (self.encoding.char_to_token(place - self.start) for place in range(character, last + 1))
        return next((token for token in places if token is not None), 0)


def is_long(text: str) -> bool:
    """Return whether a document is tokenized in windows: if it takes four or more."""
    return len(text) > 4 * WINDOW


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[np.ndarray]:
    """Return the ids of each document, (T,) int64, without special tokens around it. Fast tokenizers use every core."""
    short = [document for document in documents if not is_long(document)]
    encoded: list[list[int]] = []
    if short:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = tokenizer(short, **options)["input_ids"]
    in_turn = iter(encoded)
    return [
        np.concatenate([ids for ids, _ in encode_long(tokenizer, document)])
        if is_long(document)
        else np.asarray(next(in_turn), dtype=np.int64)
        for document in documents
    ]


def encode_long(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the ids of a document in pieces, int64, each with the part of the document that is done, up to 1.

    They are those that the document has in one piece, without special tokens around it. A tokenizer without a backend
    in Rust encodes it in one piece.
    """
    if not tokenizer.is_fast:
        yield np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64), 1.0
        return
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def encode(start: int, stop: int) -> _Window:
        encoding = backend.encode(text[start:stop], add_special_tokens=False)
        return _Window(start, min(stop, len(text)), np.asarray(encoding.ids, dtype=np.int64), encoding)

    first, window = 0, encode(0, WINDOW)
    while window.stop < len(text):
        following = encode(window.stop - OVERLAP, window.stop - OVERLAP + WINDOW)
        place = _splice(window, following)
        if place is None:
            window = encode(window.start, following.stop)
            continue
        yield window.ids[first : place[0]], window.stop / len(text)
        window, first = following, place[1]
    yield window.ids[first:], 1.0


def _splice(window: _Window, following: _Window) -> tuple[int, int] | None:
    """Return the number of the same token in both windows from which the second continues; None = they disagree."""
    middle = following.start + GUARD, window.stop - GUARD
    (ours, our_spans), (theirs, their_spans) = window.tokens(*middle), following.tokens(*middle)
    same = len(ours) == len(theirs) > 0 and our_spans == their_spans
    same = same and np.array_equal(window.ids[ours.start : ours.stop], following.ids[theirs.start : theirs.stop])
    return (ours.start, theirs.start) if same else None
