"""Pairs of text for masked models with next-sentence prediction: [CLS] A [SEP] B [SEP].

"Sentences" are spans of contiguous text, not sentences of a language (Devlin et al. 2019, sections 3.1 and A.2). Each
document is cut into chunks of S - 3 tokens, the last of which may be shorter; chunks of one token are dropped. A chunk
is split at random into A and B, and half of the time B is replaced by a random span of the same length from another
document.
"""

import numpy as np

from megatron_ds.columns import INPUT_IDS, TARGETS, TOKEN_TYPE_IDS
from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.noise.masking import Masker
from megatron_ds.data.noise.seeded_random import Purpose, SeededRandom
from megatron_ds.data.objective import Masked
from megatron_ds.data.readers.concat_index import ConcatIndex
from megatron_ds.data.text.corpus import Corpus
from megatron_ds.data.text.masked import describe_masking
from megatron_ds.errors import DataError

FOLLOWS, RANDOM = 0, 1
_NUM_SPECIAL = 3  # [CLS] and two [SEP]
_SMALLEST_CHUNK = 2


class SentencePairs:
    """One sample of S positions for each chunk, padded on the right.

    Args:
        corpus: a stream of tokens, in which each document ends with the separator; a separator inside a text ends a
            document too.
        seq_length: S.
        objective: with `next_sentence`.
        masker: hides tokens.

    Raises:
        DataError: S is below 5, or there is too little text for a pair, or for one with a random B.
    """

    target_length = None
    ordered = False

    def __init__(self, corpus: Corpus, seq_length: int, objective: Masked, masker: Masker) -> None:
        if seq_length < _NUM_SPECIAL + _SMALLEST_CHUNK:
            raise DataError(
                f"data.seq_length={seq_length} leaves no room for a pair next to {_NUM_SPECIAL} special tokens; "
                f"nearest: {_NUM_SPECIAL + _SMALLEST_CHUNK}"
            )
        self.seq_length = seq_length
        types = ("token_type_ids",) if objective.token_types else ()
        self.columns = ("input_ids", "targets", "attention_mask", *types, "next_sentence_label")
        self.fingerprint = corpus.fingerprint(f"seq_length={seq_length}", "pairs", masker.identity)
        self._tokens, self.bad_rows = corpus.tokens, corpus.bad_rows
        self._objective = objective
        self._masker = masker
        self._find_chunks(corpus.name)

    def _find_chunks(self, name: str) -> None:
        ends = self._tokens.positions_of(self._masker.ids.sep)
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
        not_empty = ends > starts
        self._starts, self._sizes = starts[not_empty], (ends - starts)[not_empty]
        full, rest = np.divmod(self._sizes, self._chunk_size)
        self._chunks = ConcatIndex(full + (rest >= _SMALLEST_CHUNK))
        if len(self._chunks) == 0:
            raise DataError(f"data: {name}: no document of {_SMALLEST_CHUNK} tokens to make a pair of; add text")
        if len(self._sizes) == 1 and self._sizes[0] <= self._chunk_size:
            raise DataError(
                f"data: {name}: one document of {self._sizes[0]} tokens holds one pair of data.seq_length="
                f"{self.seq_length} and no text for a random one; add a document, or lower data.seq_length"
            )

    @property
    def _chunk_size(self) -> int:
        return self.seq_length - _NUM_SPECIAL

    def __len__(self) -> int:
        return len(self._chunks)

    def sample(self, index: int) -> Sample:
        """Return (S,) each; `next_sentence_label` is (): FOLLOWS or RANDOM."""
        random = SeededRandom(self._objective.seed, Purpose.PAIRING, index)
        document, chunk = self._chunks.locate(index % len(self))
        start = int(self._starts[document]) + chunk * self._chunk_size
        stop = min(start + self._chunk_size, self._end(document))
        split = start + 1 + random.integer(stop - start - 1)
        label = random.integer(2)
        second = (split, stop)
        if label == RANDOM:
            second = self._random_span(document, start, stop, stop - split, random)
        return self._pack(index, self._tokens.read(start, split), self._tokens.read(*second), label)

    def _end(self, document: int) -> int:
        return int(self._starts[document] + self._sizes[document])

    def _random_span(self, document: int, start: int, stop: int, length: int, random: SeededRandom) -> tuple[int, int]:
        """Return the bounds of `length` tokens of another document, or of all its tokens if it is shorter.

        With a single document, the span is outside the chunk [start, stop).
        """
        if len(self._sizes) > 1:
            other = random.integer(len(self._sizes) - 1)
            other += other >= document
            stretches = [(int(self._starts[other]), self._end(other))]
        else:
            stretches = [(int(self._starts[document]), start), (stop, self._end(document))]
        length = min(length, max(end - begin for begin, end in stretches))
        places = ConcatIndex([max(0, end - begin - length + 1) for begin, end in stretches])
        stretch, offset = places.locate(random.integer(len(places)))
        begin = stretches[stretch][0] + offset
        return begin, begin + length

    def _pack(self, index: int, first: np.ndarray, second: np.ndarray, label: int) -> Sample:
        special, length = self._masker.ids, self.seq_length
        ids = np.concatenate([[special.cls], first, [special.sep], second, [special.sep]])
        inputs, targets = self._masker.hide(ids, index)
        sample = {
            "input_ids": INPUT_IDS.pad(inputs, length, self._objective.padding_id),
            "targets": TARGETS.pad(targets, length),
            "attention_mask": np.arange(length) < len(ids),
            "next_sentence_label": np.array(label, dtype=np.int64),
        }
        if self._objective.token_types:
            types = np.repeat(np.array([0, 1], dtype=np.int64), [len(first) + 2, len(second) + 1])
            sample["token_type_ids"] = TOKEN_TYPE_IDS.pad(types, length)
        return sample

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Return a line such as `353,442 tokens, 812 pairs of up to 512, 15 % masked`."""
        return (
            f"{format_count(len(self._tokens))} tokens, {len(self):,} pairs of up to {self.seq_length}, "
            f"{describe_masking(self._objective)}{self.bad_rows.note}"
        )
