"""Which tokens belong to one word, read off the three marks that tokenizers put on their tokens.

WordPiece marks the token that continues a word (`##ing`); byte-level BPE and SentencePiece mark the space before one
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
class WordMarks:
    """What the tokenizer's marks say of each id.

    Attributes:
        continues: (V,) bool, the token goes on with the word of the token before it.
        closes: (V,) bool, the token ends a line, so that the next one begins a word whatever its mark.
    """

    continues: np.ndarray
    closes: np.ndarray

    def words_of(self, ids: np.ndarray, breaks: np.ndarray) -> np.ndarray:
        """The number of the word that each token belongs to, counted from the left: (L,) int64.

        Args:
            ids: (L,).
            breaks: (L,) bool, tokens that belong to no word: each is one by itself, and what follows begins another.
        """
        begins = ~self.continues[ids] | breaks
        begins[1:] |= breaks[:-1] | self.closes[ids[:-1]]
        begins[:1] = True
        return np.cumsum(begins, dtype=np.int64) - 1


def word_marks(tokenizer: PreTrainedTokenizerBase, tokenizer_path: str, num_ids: int) -> WordMarks:
    """The marks of ids 0 .. num_ids - 1; an id that the tokenizer does not give is a word by itself.

    The convention is the one whose mark is on the most tokens: a vocabulary of bytes may well hold a plain `##` too.

    Raises:
        DataError: no token carries any of the marks.
    """
    vocabulary = tokenizer.get_vocab()
    marks = (WORDPIECE, BYTE_LEVEL, SENTENCEPIECE)
    counts = {mark: sum(token.startswith(mark) and token != mark for token in vocabulary) for mark in marks}
    mark = max(marks, key=lambda mark: counts[mark])
    if counts[mark] == 0:
        raise DataError(
            f"tokenizer {tokenizer_path}: its tokens do not tell where words begin (none has {' or '.join(marks)}), "
            "but data.whole_words=true needs that; set data.whole_words=false"
        )
    continues, closes = np.zeros((2, num_ids), dtype=bool)
    for token, token_id in vocabulary.items():
        if token_id < num_ids:
            continues[token_id] = _continues(token, mark)
            closes[token_id] = mark == BYTE_LEVEL and token.endswith(_BYTE_LEVEL_SPACES[1:])
    return WordMarks(continues, closes)


def _continues(token: str, mark: str) -> bool:
    if mark == WORDPIECE:
        return token.startswith(mark) and token != mark
    return not token.startswith(_BYTE_LEVEL_SPACES if mark == BYTE_LEVEL else mark)
