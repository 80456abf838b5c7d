"""Samples of `data.format: tokenized`: one example each, padded on the right.

The meaning of the columns depends on the kind of model: see `causal`, `masked` and `seq2seq`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_ds.cache import cache_folder
from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.concat_index import ConcatIndex
from megatron_ds.data.readers.examples import ExampleFile, Located, open_examples
from megatron_ds.data.readers.source import Source, as_source
from megatron_ds.data.readers.sources import find_source
from megatron_ds.data.tokenized.validation import FIELDS, Example
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger


class ExampleKind(Protocol):
    """The rules of one kind of model: how an example is checked and becomes a sample."""

    @property
    def seq_length(self) -> int:
        """S, positions of a sample."""

    @property
    def target_length(self) -> int | None:
        """T; None where there is no separate encoder."""

    @property
    def identity(self) -> str:
        """A text that changes with every setting that affects samples; part of the fingerprint."""

    def parse(self, located: Located) -> Example:
        """Return the columns of an example, checked against the run.

        Raises:
            DataError: the example is malformed or does not fit the model.
        """

    def count_targets(self, example: Example) -> int:
        """Return the number of tokens with loss; an estimate where they are chosen at random."""

    def columns(self, given: frozenset[str], some_shorter: bool) -> tuple[str, ...]:
        """Return the column names of all samples.

        Args:
            given: columns that at least one example has.
            some_shorter: whether any example has fewer than S input ids.
        """

    def sample(self, example: Example, index: int) -> Sample:
        """Return the sample of an example, with all columns that the kind of model knows."""


class TokenizedDataset:
    """The examples of all sources in order, one sample each.

    Everything is checked once, here, in a streaming pass; later, examples are read again, one by one, on demand.

    Args:
        sources: files, directories, patterns, directories saved by `datasets`, or hub ids.
        kind: the rules of the kind of model.
        cache_dir: directory for rows that are read once from start to end; None = that of the user.

    Attributes:
        bad_rows: account of the rows that were left out.

    Raises:
        DataError: a source is missing or empty, or an example is malformed or too long.
    """

    ordered = False

    def __init__(self, sources: Sequence[str | Source], kind: ExampleKind, cache_dir: Path | None = None) -> None:
        census, directory = _Census(kind), cache_dir or cache_folder("tokens")
        self._parts: list[ExampleFile] = []
        self.bad_rows = BadRows()
        for source in map(as_source, sources):
            bad = source.bad_rows()
            found = find_source(source, plain_text=False)
            self._parts += open_examples(found, census.add, bad, directory)
            self.bad_rows.include(bad)
        self._examples = ConcatIndex([len(part) for part in self._parts])
        if len(self._examples) == 0:
            names = ", ".join(map(str, sources))
            self.bad_rows.refuse_all(names)
            raise DataError(f"data: {names}: no examples; each line or row must hold one")
        self.bad_rows.log()
        if census.ignored:
            get_logger("data").info("columns that models do not read: %s", ", ".join(sorted(census.ignored)))
        self._kind = kind
        self._num_tokens, self._num_targets = census.num_tokens, census.num_targets
        self.seq_length = kind.seq_length
        self.target_length = kind.target_length
        self.columns = kind.columns(frozenset(census.given), census.some_shorter)
        content = f"tokenized\n{census.digest.hexdigest()}\nseq_length={self.seq_length}\n{kind.identity}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def sample(self, index: int) -> Sample:
        """Return example `index % len`, padded; noise, if any, is that of `index`."""
        part, offset = self._examples.locate(index % len(self))
        sample = self._kind.sample(self._kind.parse(self._parts[part].read(offset)), index)
        return {name: sample[name] for name in self.columns}

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Return a line such as `1,234 examples of up to 512 tokens: 0.4 M tokens, 0.3 M targets`."""
        return (
            f"{len(self):,} examples of up to {self.seq_length} tokens: "
            f"{format_count(self._num_tokens)} tokens, {format_count(self._num_targets)} targets{self.bad_rows.note}"
        )


class _Census:
    """A pass over all examples that checks, counts and hashes them."""

    def __init__(self, kind: ExampleKind) -> None:
        self._kind = kind
        self.num_tokens = self.num_targets = 0
        self.some_shorter = False
        self.given: set[str] = set()
        self.ignored: set[str] = set()
        self.digest = hashlib.sha256()

    def add(self, located: Located) -> None:
        example = self._kind.parse(located)
        length = len(example["input_ids"])
        self.num_tokens += length
        self.num_targets += self._kind.count_targets(example)
        self.some_shorter |= length < self._kind.seq_length
        self.given |= set(example)
        self.ignored |= set(located.columns).difference(FIELDS)
        for name, array in example.items():
            self.digest.update(f"{name} {array.size}\n".encode() + array.tobytes())
        self.digest.update(b"\n")
