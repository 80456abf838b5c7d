"""Masked samples of text: [CLS] tokens [SEP], with some of the tokens hidden.

Sample i takes tokens [i*L, i*L + L) of the stream, L = S - 2, regardless of document boundaries; the separator that
ends a document stays between it and the next (Liu et al. 2019, section 4.2, full sentences).
"""

import numpy as np

from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.noise.masking import Masker
from megatron_ds.data.objective import Masked
from megatron_ds.data.text.corpus import Corpus
from megatron_ds.errors import DataError

_NUM_SPECIAL = 2  # [CLS] and [SEP]


class MaskedText:
    """Samples of S positions; `len` is T // (S - 2), the remainder at the end is dropped.

    Args:
        corpus: a stream of T tokens, in which each document ends with the separator.
        seq_length: S.
        objective: without `next_sentence`.
        masker: hides tokens.

    Raises:
        DataError: S is below 3, or fewer than S - 2 tokens.
    """

    target_length = None
    ordered = False

    def __init__(self, corpus: Corpus, seq_length: int, objective: Masked, masker: Masker) -> None:
        if seq_length <= _NUM_SPECIAL:
            raise DataError(
                f"data.seq_length={seq_length} leaves no room for text next to {_NUM_SPECIAL} special tokens; "
                f"nearest: {_NUM_SPECIAL + 1}"
            )
        largest = len(corpus.tokens) + _NUM_SPECIAL if len(corpus.tokens) else 0
        corpus.require_sample(seq_length - _NUM_SPECIAL, seq_length, largest)
        self.seq_length = seq_length
        self.columns = ("input_ids", "targets", *(("token_type_ids",) if objective.token_types else ()))
        self.fingerprint = corpus.fingerprint(f"seq_length={seq_length}", masker.identity)
        self._tokens, self.bad_rows = corpus.tokens, corpus.bad_rows
        self._objective = objective
        self._masker = masker

    def __len__(self) -> int:
        return len(self._tokens) // (self.seq_length - _NUM_SPECIAL)

    def sample(self, index: int) -> Sample:
        """Return (S,) each; all of token type 0."""
        num_tokens = self.seq_length - _NUM_SPECIAL
        start = index % len(self) * num_tokens
        special = self._masker.ids
        ids = np.concatenate([[special.cls], self._tokens.read(start, start + num_tokens), [special.sep]])
        inputs, targets = self._masker.hide(ids, index)
        sample = {"input_ids": inputs, "targets": targets}
        if self._objective.token_types:
            sample["token_type_ids"] = np.zeros(self.seq_length, dtype=np.int64)
        return sample

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Return a line such as `353,442 tokens, 693 samples of 512, 15 % masked`."""
        return (
            f"{format_count(len(self._tokens))} tokens, {len(self):,} samples of {self.seq_length}, "
            f"{describe_masking(self._objective)}{self.bad_rows.note}"
        )


def describe_masking(objective: Masked) -> str:
    """Return `15 % masked`, or `15 % masked as whole words`."""
    return f"{objective.mask_rate * 100:g} % masked{' as whole words' if objective.whole_words else ''}"
