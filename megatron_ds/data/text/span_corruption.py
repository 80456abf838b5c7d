"""Samples of text for sequence-to-sequence models: spans are cut out of the text, and the decoder writes them.

Sample i takes tokens [i*L, i*L + L) of the stream, regardless of document boundaries, with the largest L whose
corrupted input fits S positions. `noise.span_corruption` cuts the spans.
"""

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.columns import INPUT_IDS, TARGETS
from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.noise.seeded_random import Purpose, SeededRandom
from megatron_ds.data.noise.span_corruption import CorruptionLengths, corrupt, corruption_lengths, fit_lengths
from megatron_ds.data.objective import Seq2Seq
from megatron_ds.data.readers.tokenizer import require_ids_below
from megatron_ds.data.text.corpus import Corpus
from megatron_ds.errors import DataError

_SMALLEST_LENGTH = 3  # a token, a sentinel and the end
_TARGET_MULTIPLE = 8  # suits tensor cores and the split of sequences over ranks


class CorruptedText:
    """Samples of S positions for the encoder and T for the decoder; `len` is tokens // L.

    Args:
        corpus: a stream of tokens.
        seq_length: S.
        objective: how much is cut out; its T, or None for the smallest multiple of 8 that holds the targets.
        sentinels: (CorruptionLengths.sentinels,) ids.
        end_id: the end-of-text token.

    Raises:
        DataError: S is below 3, T is below the number of target tokens, or fewer than L tokens.
    """

    ordered = False

    def __init__(self, corpus: Corpus, seq_length: int, objective: Seq2Seq, sentinels: np.ndarray, end_id: int) -> None:
        self._lengths = sample_lengths(seq_length, objective)
        self._refuse_too_short(corpus, seq_length, objective)
        self.seq_length = seq_length
        self.target_length = target_length(seq_length, objective)
        padded = ("attention_mask",) if self._lengths.inputs < seq_length else ()
        self.columns = ("input_ids", *padded, "decoder_input_ids", "targets")
        self.fingerprint = corpus.fingerprint(
            f"seq_length={seq_length}", f"target_length={self.target_length}", objective, sentinels.tolist(), end_id
        )
        self._tokens, self.bad_rows = corpus.tokens, corpus.bad_rows
        self._objective = objective
        self._sentinels = sentinels
        self._end_id, self.ends = end_id, corpus.frame.ends

    def _refuse_too_short(self, corpus: Corpus, seq_length: int, objective: Seq2Seq) -> None:
        needed = self._lengths.targets
        if objective.target_length is not None and objective.target_length < needed:
            raise DataError(
                f"data.target_length={objective.target_length} is below the {needed} target tokens that "
                f"data.seq_length={seq_length}, mask_rate={objective.mask_rate:g} and mean_span="
                f"{objective.mean_span:g} give; nearest: {needed}"
            )
        largest = 0
        if len(corpus.tokens) > 1:  # one position less than one more token would need
            largest = corruption_lengths(len(corpus.tokens) + 1, objective.mask_rate, objective.mean_span).inputs - 1
        corpus.require_sample(self._lengths.raw, seq_length, largest)

    def __len__(self) -> int:
        return len(self._tokens) // self._lengths.raw

    def sample(self, index: int) -> Sample:
        """Return (S,) inputs and (T,) targets; inputs are padded where the corrupted text is one position short."""
        start = index % len(self) * self._lengths.raw
        random = SeededRandom(self._objective.seed, Purpose.CORRUPTION, index)
        tokens = self._tokens.read(start, start + self._lengths.raw)
        inputs, spans = corrupt(tokens, self._lengths, self._sentinels, self._end_id, random)
        targets = TARGETS.pad(spans, self.target_length)
        sample = {
            "input_ids": INPUT_IDS.pad(inputs, self.seq_length, self._objective.padding_id),
            "decoder_input_ids": self._objective.decoder_inputs(targets),
            "targets": targets,
        }
        if "attention_mask" in self.columns:
            sample["attention_mask"] = np.arange(self.seq_length) < len(inputs)
        return sample

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Return a line such as `353,442 tokens, 622 samples of 512 with targets of 120, 15 % masked in spans of 3`."""
        return (
            f"{format_count(len(self._tokens))} tokens, {len(self):,} samples of {self.seq_length} with targets of "
            f"{self.target_length}, {self._objective.mask_rate * 100:g} % masked in spans of "
            f"{self._objective.mean_span:g}{self.bad_rows.note}"
        )


def sample_lengths(seq_length: int, objective: Seq2Seq) -> CorruptionLengths:
    """Return the numbers of tokens and spans of every sample of S = `seq_length`.

    Raises:
        DataError: S is below 3.
    """
    lengths = fit_lengths(seq_length, objective.mask_rate, objective.mean_span)
    if lengths is None:
        raise DataError(
            f"data.seq_length={seq_length} leaves no room for text next to a sentinel and the end; "
            f"nearest: {_SMALLEST_LENGTH}"
        )
    return lengths


def target_length(seq_length: int, objective: Seq2Seq) -> int:
    """Return T: the objective's, or the smallest multiple of 8 that holds the targets.

    Raises:
        DataError: S is below 3.
    """
    targets = sample_lengths(seq_length, objective).targets
    return objective.target_length or -(-targets // _TARGET_MULTIPLE) * _TARGET_MULTIPLE


def find_sentinels(
    tokenizer: PreTrainedTokenizerBase, tokenizer_path: str, seq_length: int, objective: Seq2Seq, vocab_size: int
) -> np.ndarray:
    """Return the ids of <extra_id_0>, <extra_id_1>, ..., as many as a sample of `seq_length` needs.

    Raises:
        DataError: the tokenizer has fewer of them, or the model lacks one of the ids.
    """
    needed = sample_lengths(seq_length, objective).sentinels
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while len(ids) < needed and (sentinel := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[sentinel])
    if len(ids) < needed:
        raise DataError(_too_few_sentinels(len(ids), needed, tokenizer_path, seq_length, objective))
    require_ids_below(vocab_size, max(ids), tokenizer_path)
    return np.array(ids, dtype=np.int64)


def _too_few_sentinels(there: int, needed: int, tokenizer_path: str, seq_length: int, objective: Seq2Seq) -> str:
    takes = f"but data.seq_length={seq_length} with mean_span={objective.mean_span:g} takes {needed}"
    if there == 0:
        return f"tokenizer {tokenizer_path}: it has no sentinel <extra_id_0>, {takes}; use a T5 tokenizer"
    shorter = seq_length
    while shorter > _SMALLEST_LENGTH and sample_lengths(shorter, objective).sentinels > there:
        shorter -= 1
    lower = f"lower data.seq_length to {shorter}, " if sample_lengths(shorter, objective).sentinels <= there else ""
    return (
        f"tokenizer {tokenizer_path}: it has {there} sentinels, <extra_id_0> to <extra_id_{there - 1}>, {takes}; "
        f"{lower}raise data.mean_span or use a T5 tokenizer with more"
    )
