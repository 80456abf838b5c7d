"""`format: tokenized`: examples of token ids in transformers' convention, one sample each.

An example has `input_ids` and, where wanted, `labels` (aligned with `input_ids`; -100 is ignored; absent = `input_ids`)
and `attention_mask`. A causal model of transformers shifts the labels inside; here they are shifted when a sample is
read: targets[t] = labels[t + 1], and the last position has none. Samples are padded on the right to `seq_length`.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_ds.data.sample import IGNORE_INDEX, Sample
from megatron_ds.data.sources import JSON_SUFFIXES, FileSource, TableSource, find_source, json_lines, parse_json_line
from megatron_ds.data.text import count
from megatron_ds.errors import DataError

PAD_ID = 0  # any valid id will do: padded positions have no target, and a causal model never looks ahead at them
COLUMNS = ("input_ids", "labels", "attention_mask")
OTHER_MODELS_COLUMNS = {
    "token_type_ids": "BERT-like",
    "next_sentence_label": "BERT-like",
    "decoder_input_ids": "encoder-decoder",
    "decoder_attention_mask": "encoder-decoder",
}
_TABLE_ROWS = 256


@dataclass(frozen=True)
class Example:
    """One example as it was written: (L,) int64 ids and labels, (L,) bool mask or None; L differs between examples."""

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray | None


class Located(NamedTuple):
    """The columns of an example and where they stand, for errors."""

    columns: Mapping[str, Any]
    where: str


class TokenizedDataset:
    """The examples of all sources in order, one sample of S positions each.

    Everything is checked once, here, in a streaming pass; examples are read again, one by one, when asked for.

    Args:
        sources: JSON-lines files, directories of them, directories saved by `datasets`, or hub ids.
        seq_length: S.
        vocab_size: ids must be below it.

    Raises:
        DataError: a source is missing or empty, or an example is malformed or longer than S.
    """

    def __init__(self, sources: Sequence[str], seq_length: int, vocab_size: int) -> None:
        self.seq_length = seq_length
        census = _Census(seq_length, vocab_size)
        self._parts = [part for source in sources for part in _open_parts(source, census)]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        if census.num_examples == 0:
            raise DataError(f"data: {', '.join(sources)}: no examples; each line or row must hold one")
        self._num_tokens, self._num_targets = census.num_tokens, census.num_targets
        self.has_attention_mask = census.has_attention_mask
        content = f"tokenized\n{census.digest.hexdigest()}\nseq_length={seq_length}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, index: int) -> Sample:
        """Example `index`, shifted and padded: (S,) each.

        `attention_mask` is False where padding was added; an example without one among examples that have one counts
        as True throughout, as transformers would take it.
        """
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        part = int(np.searchsorted(self._ends, index, side="right"))
        offset = index - (int(self._ends[part]) - len(self._parts[part]))
        example = parse_example(self._parts[part].read(offset))
        length = len(example.input_ids)
        input_ids = np.full(self.seq_length, PAD_ID, dtype=np.int64)
        input_ids[:length] = example.input_ids
        targets = np.full(self.seq_length, IGNORE_INDEX, dtype=np.int64)
        targets[: length - 1] = example.labels[1:]
        if not self.has_attention_mask:
            return Sample(input_ids, targets)
        mask = np.zeros(self.seq_length, dtype=bool)
        mask[:length] = True if example.attention_mask is None else example.attention_mask
        return Sample(input_ids, targets, mask)

    def describe(self) -> str:
        """Such as `1,234 examples of up to 512 tokens: 0.4 M tokens, 0.3 M targets`."""
        return (
            f"{len(self):,} examples of up to {self.seq_length} tokens: "
            f"{count(self._num_tokens)} tokens, {count(self._num_targets)} targets"
        )


def parse_example(located: Located) -> Example:
    """The columns of one example as arrays. A column that holds null counts as absent.

    Raises:
        DataError: unknown columns, a column that is not a flat list of integers, or lengths that differ.
    """
    columns, where = located
    for name in columns:
        if name not in COLUMNS:
            raise DataError(_unknown_column(name, where))
    if columns.get("input_ids") is None:
        raise DataError(f"data: {where}: no 'input_ids'; every example needs them")
    input_ids = _integers(columns["input_ids"], f"{where}: input_ids")
    arrays = {"labels": input_ids}
    for name in ("labels", "attention_mask"):
        if columns.get(name) is not None:
            arrays[name] = _integers(columns[name], f"{where}: {name}", booleans=name == "attention_mask")
            if len(arrays[name]) != len(input_ids):
                raise DataError(
                    f"data: {where}: {name} has {len(arrays[name])} entries, input_ids has {len(input_ids)}; "
                    "they must be equally long"
                )
    mask = arrays.get("attention_mask")
    if mask is not None and not np.isin(mask, (0, 1)).all():
        raise DataError(f"data: {where}: attention_mask must hold only 0 and 1, found {_first_outside(mask, 0, 1)}")
    return Example(input_ids, arrays["labels"], None if mask is None else mask.astype(bool))


class _Census:
    """Checks every example against the run as it goes by, and counts and hashes it."""

    def __init__(self, seq_length: int, vocab_size: int) -> None:
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self.num_examples = self.num_tokens = self.num_targets = 0
        self.has_attention_mask = False
        self.digest = hashlib.sha256()

    def add(self, located: Located) -> None:
        example = parse_example(located)
        self._check(example, located.where)
        length = len(example.input_ids)
        self.num_examples += 1
        self.num_tokens += length
        self.num_targets += int((example.labels[1:] != IGNORE_INDEX).sum())
        self.has_attention_mask |= example.attention_mask is not None
        self.digest.update(b"%d %d\n" % (length, example.attention_mask is not None))
        for array in (example.input_ids, example.labels, example.attention_mask):
            if array is not None:
                self.digest.update(array.tobytes())

    def _check(self, example: Example, where: str) -> None:
        length, last_id = len(example.input_ids), self._vocab_size - 1
        if length > self._seq_length:
            raise DataError(
                f"data: {where}: {length} tokens exceed data.seq_length={self._seq_length}; "
                f"raise data.seq_length to {length} or cut the example"
            )
        labels = example.labels[example.labels != IGNORE_INDEX]
        for name, ids in (("input_ids", example.input_ids), ("labels", labels)):
            if len(ids) and ids.max() > last_id:
                raise DataError(
                    f"data: {where}: {name} holds {ids.max()}, but the model's vocab_size={self._vocab_size} ends at "
                    f"{last_id}; tokenise with the model's own tokenizer"
                )
            if len(ids) and ids.min() < 0:
                rule = "ids are 0 or more" if name == "input_ids" else "only -100 means ignored"
                raise DataError(f"data: {where}: {name} holds {ids.min()}; {rule}")


class _Part(Protocol):
    def __len__(self) -> int: ...

    def read(self, index: int) -> Located: ...


class _JsonLinesPart:
    """The examples of one file: the offset of each line is kept, a line is parsed when it is asked for."""

    def __init__(self, path: Path, census: _Census) -> None:
        self._path = path
        index = []
        for line in json_lines(path):
            census.add(Located(line.value, f"{path}:{line.number}"))
            index.append((line.number, line.offset, line.num_bytes))
        self._index = np.asarray(index, dtype=np.int64).reshape(-1, 3)
        # Mapped rather than opened: forked processes would share the position of an open file.
        self._raw = np.memmap(path, dtype=np.uint8, mode="r") if index else np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Located:
        number, offset, num_bytes = self._index[index].tolist()
        where = f"{self._path}:{number}"
        return Located(parse_json_line(self._raw[offset : offset + num_bytes].tobytes(), where), where)


class _TablePart:
    """The rows of a `datasets.Dataset`."""

    def __init__(self, source: TableSource, census: _Census) -> None:
        self._source = source
        row = 0
        for batch in source.table.iter(_TABLE_ROWS):
            for values in zip(*batch.values()):
                census.add(Located(dict(zip(batch, values)), f"{source.name}: row {row}"))
                row += 1

    def __len__(self) -> int:
        return len(self._source.table)

    def read(self, index: int) -> Located:
        return Located(self._source.table[index], f"{self._source.name}: row {index}")


def _open_parts(source: str, census: _Census) -> Iterable[_Part]:
    found = find_source(source, JSON_SUFFIXES)
    if isinstance(found, FileSource):
        return [_JsonLinesPart(path, census) for path in found.paths]
    return [_TablePart(found, census)]


def _integers(value: object, where: str, booleans: bool = False) -> np.ndarray:
    """A flat, non-empty list of integers (or, if allowed, booleans) as (L,) int64."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # ragged
        array = np.empty((0, 0))
    if array.ndim == 1 and len(array) == 0:
        raise DataError(f"data: {where} is empty; remove the example")
    if array.ndim != 1 or array.dtype.kind not in ("ib" if booleans else "i"):
        kind = type(value).__name__
        if isinstance(value, list):
            kind = next((type(item).__name__ for item in value if type(item) is not int), "integers beyond 64 bits")
        raise DataError(f"data: {where} must be a flat list of integers, found {kind}")
    return array.astype(np.int64)


def _first_outside(array: np.ndarray, low: int, high: int) -> int:
    return int(array[(array < low) | (array > high)][0])


def _unknown_column(name: str, where: str) -> str:
    known = ", ".join(COLUMNS)
    if name in OTHER_MODELS_COLUMNS:
        kind = OTHER_MODELS_COLUMNS[name]
        return f"data: {where}: column {name!r} belongs to {kind} models, but this model is causal; it takes {known}"
    nearest = difflib.get_close_matches(name, COLUMNS, n=1)
    fix = f"did you mean {nearest[0]!r}?" if nearest else "remove the column"
    return f"data: {where}: unknown column {name!r}; known are {known}; {fix}"
