"""Word boundaries for whole-word masking, from the tokenizer's prefix markers.

WordPiece marks tokens that continue a word (`##ing`); byte-level BPE and SentencePiece mark the space before a token
that begins a word (`Ġ`, `▁`).
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.errors import DataError

WORDPIECE, BYTE_LEVEL, SENTENCEPIECE = "##", "Ġ", "▁"
# Byte-level BPE writes each byte as a character: these are space, line feed, carriage return and tab.
_BYTE_LEVEL_SPACES = (BYTE_LEVEL, "Ċ", "č", "ĉ")


@dataclass(frozen=True)
class WordBoundaries:
    """Word boundaries by token id.

    Attributes:
        continues: (V,) bool, the token continues the word of the token before it.
        closes: (V,) bool, the token ends a line, so that the next one begins a word whatever its marker.
    """

    continues: np.ndarray
    closes: np.ndarray

    def word_numbers(self, ids: np.ndarray, breaks: np.ndarray) -> np.ndarray:
        """Return the number of each token's word, counted from the left: (L,) int64.

        Args:
            ids: (L,).
            breaks: (L,) bool, tokens outside of words: each counts as a word, and the token after it begins another.
        """
        begins = ~self.continues[ids] | breaks
        begins[1:] |= breaks[:-1] | self.closes[ids[:-1]]
        begins[:1] = True
        return np.cumsum(begins, dtype=np.int64) - 1


def word_boundaries(tokenizer: PreTrainedTokenizerBase, tokenizer_path: str, num_ids: int) -> WordBoundaries:
    """Return the boundaries for ids 0 .. num_ids - 1; ids that the tokenizer lacks are words of their own.

    The convention is the one whose marker is on the most tokens: a byte-level vocabulary may hold a plain `##` too.

    Raises:
        DataError: no token has any of the markers.
    """
    vocabulary = tokenizer.get_vocab()
    markers = (WORDPIECE, BYTE_LEVEL, SENTENCEPIECE)
    counts = {marker: sum(token.startswith(marker) and token != marker for token in vocabulary) for marker in markers}
    marker = max(markers, key=lambda marker: counts[marker])
    if counts[marker] == 0:
        raise DataError(
            f"tokenizer {tokenizer_path}: its tokens do not show where words begin (none has {' or '.join(markers)}), "
            "but data.whole_words=true needs that; set data.whole_words=false"
        )
    continues, closes = np.zeros((2, num_ids), dtype=bool)
    for token, token_id in vocabulary.items():
        if token_id < num_ids:
            continues[token_id] = _continues(token, marker)
            closes[token_id] = marker == BYTE_LEVEL and token.endswith(_BYTE_LEVEL_SPACES[1:])
    return WordBoundaries(continues, closes)


def _continues(token: str, marker: str) -> bool:
    if marker == WORDPIECE:
        return token.startswith(marker) and token != marker
    return not token.startswith(_BYTE_LEVEL_SPACES if marker == BYTE_LEVEL else marker)
