"""Causal samples of text: S consecutive tokens as inputs, and the same shifted by one as targets.

Sample i is tokens [i*S, i*S + S] of the stream: S inputs and the S targets that follow them. Neighbouring samples share
one token, so that every token but the first is a target once.
"""

from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.text.corpus import Corpus


class CausalText:
    """Samples of S consecutive tokens of a stream; `len` is (T - 1) // S, the remainder at the end is dropped.

    Args:
        corpus: a stream of T tokens.
        seq_length: S.

    Attributes:
        begin_ids: special ids before each document.
        ends: special ids after each document, with their texts.

    Raises:
        DataError: fewer than S + 1 tokens.
    """

    columns = ("input_ids", "targets")
    target_length = None
    ordered = False

    def __init__(self, corpus: Corpus, seq_length: int) -> None:
        corpus.require_sample(seq_length + 1, seq_length, len(corpus.tokens) - 1)
        self.seq_length = seq_length
        self.fingerprint = corpus.fingerprint(f"seq_length={seq_length}")
        self.begin_ids, self.ends = corpus.frame.begin_ids, corpus.frame.ends
        self._tokens, self._begin_text = corpus.tokens, corpus.frame.begin_text
        self.bad_rows = corpus.bad_rows

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.seq_length

    def sample(self, index: int) -> Sample:
        """Return tokens [i*S, i*S + S], i = index % len, as (S,) inputs and (S,) targets; the same in every epoch."""
        start = index % len(self) * self.seq_length
        window = self._tokens.read(start, start + self.seq_length + 1)
        return {"input_ids": window[:-1], "targets": window[1:]}

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Return a line such as `353,442 tokens, 690 samples of 512, <s> before each document`."""
        begin = f", {self._begin_text} before each document" if self._begin_text else ""
        tokens = format_count(len(self._tokens))
        return f"{tokens} tokens, {len(self):,} samples of {self.seq_length}{begin}{self.bad_rows.note}"
