"""`format: text` for masked models: [CLS] tokens [SEP], with some of the tokens hidden.

Sample i takes tokens [i*L, i*L + L) of the stream, L = S - 2, whatever documents they are of; the separator that ends a
document stays between it and the next (Liu et al. 2019, section 4.2, full sentences).
"""

import numpy as np

from megatron_ds.data.dataset import Sample, blank_sample
from megatron_ds.data.noise.masking import Masker
from megatron_ds.data.objective import Masked
from megatron_ds.data.text.corpus import Corpus, count
from megatron_ds.errors import DataError

_ADDED = 2  # [CLS] and [SEP]


class MaskedText:
    """Samples of S positions; `len` is T // (S - 2), the remainder at the end is left out.

    Args:
        corpus: a stream of T tokens, in which each document ends with the separator.
        seq_length: S.
        objective: without `next_sentence`.
        masker: what hides the tokens.

    Raises:
        DataError: S is below 3, or fewer than S - 2 tokens.
    """

    target_length = None
    ordered = False

    def __init__(self, corpus: Corpus, seq_length: int, objective: Masked, masker: Masker) -> None:
        if seq_length <= _ADDED:
            raise DataError(
                f"data.seq_length={seq_length} leaves no room for text beside its {_ADDED} special tokens; "
                f"nearest: {_ADDED + 1}"
            )
        corpus.require_sample(seq_length - _ADDED, seq_length, len(corpus.tokens) + _ADDED if len(corpus.tokens) else 0)
        self.seq_length = seq_length
        self.columns = ("input_ids", "targets", *(("token_type_ids",) if objective.token_types else ()))
        self.fingerprint = corpus.fingerprint(f"seq_length={seq_length}", masker.identity)
        self._tokens = corpus.tokens
        self._objective = objective
        self._masker = masker

    def __len__(self) -> int:
        return len(self._tokens) // (self.seq_length - _ADDED)

    def sample(self, index: int) -> Sample:
        """(S,) each; all of token type 0."""
        num_tokens = self.seq_length - _ADDED
        start = index % len(self) * num_tokens
        ids = self._masker.ids
        whole = np.concatenate([[ids.cls], self._tokens.read(start, start + num_tokens), [ids.sep]])
        inputs, targets = self._masker.hide(whole, index)
        sample = {"input_ids": inputs, "targets": targets}
        if self._objective.token_types:
            sample["token_type_ids"] = np.zeros(self.seq_length, dtype=np.int64)
        return sample

    def blank(self) -> Sample:
        """See `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Such as `353,442 tokens, 693 samples of 512, 15 % masked`."""
        return (
            f"{count(len(self._tokens))} tokens, {len(self):,} samples of {self.seq_length}, {masked(self._objective)}"
        )


def masked(objective: Masked) -> str:
    """Such as `15 % masked`, or `15 % masked as whole words`."""
    return f"{objective.mask_rate * 100:g} % masked{' as whole words' if objective.whole_words else ''}"
