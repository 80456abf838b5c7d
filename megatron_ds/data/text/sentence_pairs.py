"""`format: text` for masked models with next-sentence prediction: [CLS] A [SEP] B [SEP].

"Sentences" are spans of contiguous text, not sentences of a language (Devlin et al. 2019, sections 3.1 and A.2). Each
document is cut into chunks of S - 3 tokens, its last one may be shorter; a chunk of one token is left out. A chunk is
split at random into A and B, and half of the time B gives way to a random span of as many tokens from another document.
"""

import numpy as np

from megatron_ds.data.dataset import IGNORE_INDEX, Sample, blank_sample
from megatron_ds.data.noise.masking import Masker
from megatron_ds.data.noise.seeded_random import Draws, Purpose
from megatron_ds.data.objective import Masked
from megatron_ds.data.readers.concat_index import Concatenation
from megatron_ds.data.text.corpus import Corpus, count
from megatron_ds.data.text.masked import masked
from megatron_ds.errors import DataError

FOLLOWS, RANDOM = 0, 1
_ADDED = 3  # [CLS] and two [SEP]
_SMALLEST_CHUNK = 2


class SentencePairs:
    """A sample of S positions for each chunk, shorter ones padded on the right.

    Args:
        corpus: a stream of tokens, in which each document ends with the separator; a separator inside a text ends a
            document too.
        seq_length: S.
        objective: with `next_sentence`.
        masker: what hides the tokens.

    Raises:
        DataError: S is below 5, or the text is so little that there is no pair, or none with a random B.
    """

    target_length = None
    ordered = False

    def __init__(self, corpus: Corpus, seq_length: int, objective: Masked, masker: Masker) -> None:
        if seq_length < _ADDED + _SMALLEST_CHUNK:
            raise DataError(
                f"data.seq_length={seq_length} leaves no room for a pair beside its {_ADDED} special tokens; "
                f"nearest: {_ADDED + _SMALLEST_CHUNK}"
            )
        self.seq_length = seq_length
        types = ("token_type_ids",) if objective.token_types else ()
        self.columns = ("input_ids", "targets", "attention_mask", *types, "next_sentence_label")
        self.fingerprint = corpus.fingerprint(f"seq_length={seq_length}", "pairs", masker.identity)
        self._tokens = corpus.tokens
        self._objective = objective
        self._masker = masker
        self._find_chunks(corpus.name)

    def _find_chunks(self, name: str) -> None:
        ends = self._tokens.positions_of(self._masker.ids.sep)
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
        held = ends > starts
        self._starts, self._sizes = starts[held], (ends - starts)[held]
        whole, rest = np.divmod(self._sizes, self._chunk_size)
        self._chunks = Concatenation(whole + (rest >= _SMALLEST_CHUNK))
        if len(self._chunks) == 0:
            raise DataError(f"data: {name}: no document of {_SMALLEST_CHUNK} tokens to make a pair of; add text")
        if len(self._sizes) == 1 and self._sizes[0] <= self._chunk_size:
            raise DataError(
                f"data: {name}: one document of {self._sizes[0]} tokens holds one pair of data.seq_length="
                f"{self.seq_length} and no text for a random one; add a document, or lower data.seq_length"
            )

    @property
    def _chunk_size(self) -> int:
        return self.seq_length - _ADDED

    def __len__(self) -> int:
        return len(self._chunks)

    def sample(self, index: int) -> Sample:
        """(S,) each but `next_sentence_label`, which is (): FOLLOWS or RANDOM."""
        draws = Draws(self._objective.seed, Purpose.PAIRING, index)
        document, chunk = self._chunks.locate(index % len(self))
        start = int(self._starts[document]) + chunk * self._chunk_size
        stop = min(start + self._chunk_size, self._end(document))
        split = start + 1 + draws.integer(stop - start - 1)
        label = draws.integer(2)
        second = (split, stop)
        if label == RANDOM:
            second = self._random_span(document, start, stop, stop - split, draws)
        return self._pack(index, self._tokens.read(start, split), self._tokens.read(*second), label)

    def _end(self, document: int) -> int:
        return int(self._starts[document] + self._sizes[document])

    def _random_span(self, document: int, start: int, stop: int, length: int, draws: Draws) -> tuple[int, int]:
        """Bounds of `length` tokens, or of as many as there are, of another document.

        Where there is only one document, they lie outside the chunk [start, stop).
        """
        if len(self._sizes) > 1:
            other = draws.integer(len(self._sizes) - 1)
            other += other >= document
            stretches = [(int(self._starts[other]), self._end(other))]
        else:
            stretches = [(int(self._starts[document]), start), (stop, self._end(document))]
        length = min(length, max(end - begin for begin, end in stretches))
        places = Concatenation([max(0, end - begin - length + 1) for begin, end in stretches])
        stretch, offset = places.locate(draws.integer(len(places)))
        begin = stretches[stretch][0] + offset
        return begin, begin + length

    def _pack(self, index: int, first: np.ndarray, second: np.ndarray, label: int) -> Sample:
        ids = self._masker.ids
        whole = np.concatenate([[ids.cls], first, [ids.sep], second, [ids.sep]])
        padding = (0, self.seq_length - len(whole))
        inputs, targets = self._masker.hide(whole, index)
        sample = {
            "input_ids": np.pad(inputs, padding, constant_values=self._objective.padding_id),
            "targets": np.pad(targets, padding, constant_values=IGNORE_INDEX),
            "attention_mask": np.arange(self.seq_length) < len(whole),
            "next_sentence_label": np.array(label, dtype=np.int64),
        }
        if self._objective.token_types:
            types = np.repeat(np.array([0, 1], dtype=np.int64), [len(first) + 2, len(second) + 1])
            sample["token_type_ids"] = np.pad(types, padding)
        return sample

    def blank(self) -> Sample:
        """See `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Such as `353,442 tokens, 812 pairs of up to 512, 15 % masked`."""
        return (
            f"{count(len(self._tokens))} tokens, {len(self):,} pairs of up to {self.seq_length}, "
            f"{masked(self._objective)}"
        )
