"""Rows as tokens, by the tokenizer's own call: what transformers' pipelines give a model for the same text.

A pair is cut as the tokenizer's `longest_first` does. The class of a word is that of its first token; its other tokens
have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.data.labelled.rows import LabelledRow
from megatron_ds.errors import DataError

_TYPES = "token_type_ids"


@dataclass(frozen=True)
class EncodedRow:
    """A row as tokens.

    Attributes:
        ids: (L,) int64, special tokens included.
        types: (L,) int64 token types; all 0 where the tokenizer has none.
        labels: those of the row; (L,) int64 for classes of words.
        full_length: number of tokens before the row was cut.
    """

    ids: np.ndarray
    types: np.ndarray
    labels: np.ndarray
    full_length: int


class RowEncoder:
    """Encoder of rows.

    Args:
        tokenizer: the tokenizer.
        path: its directory, for errors.
        seq_length: longer rows are cut.
        of_words: whether the rows are words with classes.

    Raises:
        DataError: special tokens leave no room for text, or the tokenizer cannot encode words one by one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str, seq_length: int, of_words: bool) -> None:
        self._tokenizer, self._seq_length, self._of_words = tokenizer, seq_length, of_words
        num_special = tokenizer.num_special_tokens_to_add(pair=not of_words)
        if seq_length <= num_special:
            raise DataError(
                f"data.seq_length={seq_length} leaves no room for text next to {num_special} special tokens; nearest: "
                f"{num_special + 1}"
            )
        if of_words:
            _require_words(tokenizer, path)

    @property
    def identity(self) -> str:
        """A text that changes with every setting of the tokenizer that its backend does not hold."""
        one = self._tokenizer
        return f"{one.truncation_side} {_TYPES in one.model_input_names} {self._seq_length} {self._of_words}"

    def encode(self, rows: Sequence[LabelledRow]) -> Iterator[EncodedRow]:
        """Yield the tokens of each row, in order."""
        full = self._call(rows)
        lengths = [len(one["input_ids"]) for one in full]
        long = [index for index, length in enumerate(lengths) if length > self._seq_length]
        options = {"truncation": "longest_first", "max_length": self._seq_length}
        for index, cut in zip(long, self._call([rows[index] for index in long], **options)):
            full[index] = cut
        for row, length, one in zip(rows, lengths, full):
            ids = np.asarray(one["input_ids"], dtype=np.int64)
            types = np.asarray(one.get(_TYPES, np.zeros_like(ids)), dtype=np.int64)
            yield EncodedRow(ids, types, self._labels(row, one), length)

    def _labels(self, row: LabelledRow, encoded: dict[str, Any]) -> np.ndarray:
        if not self._of_words:
            return row.labels
        words = encoded["words"]
        firsts = [word is not None and word != before for before, word in zip([None, *words], words)]
        return np.asarray(
            [row.labels[word] if first else IGNORE_INDEX for first, word in zip(firsts, words)], dtype=np.int64
        )

    def _call(self, rows: Sequence[LabelledRow], **options: Any) -> list[dict[str, Any]]:
        """Return the tokenizer's columns of each row; of words also the word of each token."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        for is_pair in (False, True):
            chosen = [index for index, row in enumerate(rows) if (row.pair is not None) == is_pair]
            if not chosen:
                continue
            texts = [[rows[index].text for index in chosen], *([[rows[i].pair for i in chosen]] if is_pair else [])]
            batch: Any = self._tokenizer(
                *texts,
                is_split_into_words=self._of_words,
                padding=False,
                return_attention_mask=False,
                verbose=False,
                **options,
            )
            for place, index in enumerate(chosen):
                found[index] = {name: column[place] for name, column in batch.items()}
                if self._of_words:
                    found[index]["words"] = batch.word_ids(place)
        return found


def _require_words(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse a tokenizer that cannot give the word of each token, or gives words other ids than their text has."""
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {path}: gives no words of its tokens, but classes of words need them; convert it to a fast "
            "tokenizer (tokenizer.json)"
        )
    apart, whole = (tokenizer(text, is_split_into_words=split) for text, split in ((["a", "b"], True), ("a b", False)))
    if apart["input_ids"] != whole["input_ids"]:
        raise DataError(
            f"tokenizer {path}: gives the words of a list other ids than in their text, where spaces are before them; "
            'set "add_prefix_space": true in its tokenizer_config.json'
        )
