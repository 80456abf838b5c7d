"""Facts about data: indexed files, files of text, chats or labelled rows, and the data of a run in its order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.columns import TARGETS
from megatron_ds.data.chat.conversations import is_conversation
from megatron_ds.data.chat.dataset import ChatDataset
from megatron_ds.data.chat.open import open_chat
from megatron_ds.data.chat.options import ChatOptions
from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.data.indexed.files import IndexedFile, index_path, tokens_path
from megatron_ds.data.inspect.histogram import LengthHistogram, length_histogram
from megatron_ds.data.inspect.labelled import class_counts, guess_objective, is_labelled, render_labelled, render_row
from megatron_ds.data.inspect.mix import BandUse, mix_lengths, mix_of
from megatron_ds.data.inspect.rendering import (
    RenderedDocument,
    RenderedSample,
    first_samples,
    render,
    render_sample,
    unpadded_length,
)
from megatron_ds.data.labelled.dataset import LabelledDataset
from megatron_ds.data.labelled.open import open_labelled
from megatron_ds.data.labels import count_labels
from megatron_ds.data.objective import Causal, DataObjective, Labelled
from megatron_ds.data.readers.bad_rows import BadRows, total_bad_rows
from megatron_ds.data.readers.examples import TEXT_COLUMN, parse_examples
from megatron_ds.data.readers.file_kinds import DataFile
from megatron_ds.data.readers.long_text import encode_documents
from megatron_ds.data.readers.source import Source
from megatron_ds.data.readers.sources import FoundSource, Table, find_source
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.data.request import DatasetRequest
from megatron_ds.data.sampler import GlobalBatches
from megatron_ds.data.text.documents import TextSource
from megatron_ds.digests import file_xxh3
from megatron_ds.errors import DataError
from megatron_ds.untrusted import read_json
from megatron_ds.untrusted.limits import DATA_RECORD

NUM_SAMPLED = 1024
"""Number of samples, evenly spaced, from which the fraction of tokens with loss is estimated."""
CHECKSUMS = "xxh3_128"
RENDERED_TOKENS = 512  # of a document; some are books
_LENGTHS_OF = {ChatDataset: "conversations", LabelledDataset: "rows"}
_UNLIMITED = 1 << 40  # as a length or a vocabulary
_BATCH = 256


@dataclass(frozen=True)
class IndexedFacts:
    """Facts about a pair of indexed files. The attributes are keys of `inspect --json`.

    Attributes:
        prefix: of both files.
        documents, sequences, tokens: their numbers; in files written by `prepare`, a sequence is a document.
        dtype: of a token.
        tokens_bytes, index_bytes: sizes of `.bin` and `.idx`.
        lengths: of the documents; None = there are no documents.
        manifest: content of the manifest that `prepare` wrote; None = there is no manifest.
        problems: a line for each difference from the manifest.
        checked: whether checksums were verified.
        shown: the first documents.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    tokens_bytes: int
    index_bytes: int
    lengths: LengthHistogram | None
    manifest: Mapping[str, Any] | None
    problems: tuple[str, ...]
    checked: bool
    shown: tuple[RenderedSample, ...]


@dataclass(frozen=True)
class TextFileFacts:
    """Facts about files of text, conversations or labelled rows. The attributes are keys of `inspect --json`.

    Attributes:
        path: of the file, or the source that names the files.
        format: `text`, `chat` or `labelled`.
        bytes: size of the files.
        learned: number of tokens that would carry loss.
        lengths: of the documents or conversations.
        num_bad_rows: number of rows that were left out.
        bad_rows: place and reason of the first of them.
        shown: the first documents or conversations.
        notes: of conversations: what is given but has no effect.
        classes: of labelled data: name of each class -> number of rows or words that have it.
    """

    path: str
    format: str
    bytes: int
    learned: int
    lengths: LengthHistogram
    num_bad_rows: int
    bad_rows: tuple[str, ...]
    shown: tuple[RenderedSample, ...]
    notes: tuple[str, ...] = ()
    classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDataFacts:
    """Facts about the data of a run. The attributes are keys of `inspect --json`.

    Attributes:
        training, validation: descriptions; None = no validation.
        fingerprint: of the training data.
        columns: of a sample.
        samples: number of samples of the training data.
        positions: of a sample, decoder positions included.
        global_batch_size: samples of a step.
        looked_at: number of samples from which `learned` is estimated.
        learned: mean number of tokens with loss in a sample.
        lengths: of the documents in the samples; None = samples are cut from a stream.
        num_bad_rows: number of rows of training and validation data that were left out.
        bad_rows: place and reason of the first of them.
        shown: the first samples of the run, without repetition.
        label_column: the column that holds the labels.
        classes: of labelled data: name of each class -> number of rows or words that have it in the training data.
        mix: bands of document lengths of the training data, with `data.long_context`.
    """

    training: str
    validation: str | None
    fingerprint: str
    columns: tuple[str, ...]
    samples: int
    positions: int
    global_batch_size: int
    looked_at: int
    learned: float
    lengths: LengthHistogram | None
    num_bad_rows: int
    bad_rows: tuple[str, ...]
    shown: tuple[RenderedSample, ...]
    label_column: str = TARGETS.name
    classes: Mapping[str, int] = field(default_factory=dict)
    mix: tuple[BandUse, ...] = ()


@runtime_checkable
class _HasLengths(Protocol):
    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: (n,)."""


def inspect_run_data(
    data: Dataset,
    valid: Dataset | None,
    order: GlobalBatches,
    objective: DataObjective,
    tokenizer_path: str | None,
    num_shown: int,
) -> RunDataFacts:
    """Inspect the data of a run.

    Args:
        data, valid: datasets as the run opens them.
        order: of the training data.
        objective: training objective of the model.
        tokenizer_path: None = ids instead of text.
        num_shown: number of samples to render.

    Raises:
        DataError: the tokenizer or a sample cannot be read.
    """
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path is not None and num_shown else None
    looked_at = min(len(data), NUM_SAMPLED)
    labels = objective.label_column.name if isinstance(objective, Labelled) else TARGETS.name
    indices = np.linspace(0, len(data) - 1, looked_at).astype(np.int64).tolist()
    learned, unpadded = _sample_facts(data, indices, labels)
    lengths = mix_lengths(data)
    if isinstance(data, _HasLengths):
        lengths = length_histogram(_LENGTHS_OF.get(type(data), "documents"), data.lengths)
    elif unpadded.min() < data.seq_length:
        lengths = length_histogram("examples" if looked_at == len(data) else f"{looked_at} examples", unpadded)
    bad_rows = total_bad_rows([data, valid])
    return RunDataFacts(
        training=data.describe(),
        validation=valid.describe() if valid is not None else None,
        fingerprint=data.fingerprint,
        columns=data.columns,
        samples=len(data),
        positions=data.seq_length + (data.target_length or 0),
        global_batch_size=order.global_batch_size,
        looked_at=looked_at,
        learned=float(learned.mean()),
        lengths=lengths,
        num_bad_rows=bad_rows.count,
        bad_rows=tuple(bad_rows.first),
        shown=tuple(
            _render(index, sample, tokenizer, objective)
            for index, sample in first_samples(data, order, min(num_shown, len(data)))
        ),
        label_column=labels,
        classes=class_counts(data),
        mix=mix_of(data),
    )


def _render(
    index: int, sample: Sample, tokenizer: PreTrainedTokenizerBase | None, objective: DataObjective
) -> RenderedSample:
    if isinstance(objective, Labelled):
        return render_labelled(index, sample, tokenizer, objective)
    return render_sample(index, sample, tokenizer, isinstance(objective, Causal))


def _sample_facts(data: Dataset, indices: Sequence[int], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of labels with loss and of unpadded input positions of some samples."""
    found = []
    for index in indices:
        sample = data.sample(index)
        found.append((count_labels(sample, [labels]), unpadded_length(sample)))
    learned, lengths = np.asarray(found).T
    return learned, lengths


def inspect_indexed(source: str, *, fast: bool, tokenizer_path: str | None, num_shown: int) -> IndexedFacts:
    """Inspect a pair of indexed files.

    Args:
        source: their prefix, or one of them.
        fast: skip checksums.
        tokenizer_path: None = no document is rendered.
        num_shown: number of documents to render.

    Raises:
        DataError: the files cannot be read.
    """
    file = IndexedFile(source)
    bounds = np.concatenate([[0], np.cumsum(file.lengths, dtype=np.int64)])
    lengths = np.diff(bounds[file.document_indices])
    manifest = _manifest(file.prefix)
    shown = []
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path)
        for number in range(min(num_shown, file.num_documents)):
            sequences = range(int(file.document_indices[number]), int(file.document_indices[number + 1]))
            ids = np.concatenate([np.empty(0, np.int64), *(file.read(sequence) for sequence in sequences)])
            ids = _require_known_ids(ids.astype(np.int64), len(tokenizer), tokenizer_path, file.prefix)
            learned = np.zeros(len(ids), dtype=bool)
            shown.append(RenderedSample(number, (render((ids, learned), tokenizer, most=RENDERED_TOKENS),)))
    return IndexedFacts(
        prefix=file.prefix,
        documents=file.num_documents,
        sequences=len(file),
        tokens=file.num_tokens,
        dtype=file.dtype.name,
        tokens_bytes=tokens_path(file.prefix).stat().st_size,
        index_bytes=index_path(file.prefix).stat().st_size,
        lengths=length_histogram("documents", lengths) if len(lengths) else None,
        manifest=manifest,
        problems=tuple(_problems(file, manifest, fast)) if manifest is not None else (),
        checked=manifest is not None and not fast,
        shown=tuple(shown),
    )


def inspect_file(path: str, tokenizer_path: str, num_shown: int, *, skip_bad: bool = False) -> TextFileFacts:
    """Inspect files of text, conversations or labelled rows.

    Args:
        path: a source: a file, a pattern, or a directory saved by `datasets`.
        tokenizer_path: directory of a tokenizer.
        num_shown: number of documents to render.
        skip_bad: leave out rows that hold none of them.

    Raises:
        DataError: the files hold none of them, or the tokenizer does not fit them.
    """
    source = Source(path, skip_bad=skip_bad)
    found = find_source(source, plain_text=True)
    size = sum(part.path.stat().st_size for part in found.parts if isinstance(part, DataFile))
    size += sum(part.table.data.nbytes for part in found.parts if isinstance(part, Table))
    format = _format_of(found)
    if format == "labelled":
        return _labelled_file(found, tokenizer_path, num_shown, size)
    if format == "text":
        lengths, bad, shown = _texts(source, tokenizer_path, num_shown)
        histogram = length_histogram("documents", lengths)
        return TextFileFacts(path, "text", size, int(lengths.sum()), histogram, bad.count, tuple(bad.first), shown)
    with TemporaryDirectory() as directory:
        request = DatasetRequest(
            (source,), Causal(), _UNLIMITED, _UNLIMITED, tokenizer_path, Path(directory), options=ChatOptions()
        )
        data = open_chat(request)
        tokenizer = load_tokenizer(tokenizer_path)
        learned = sum(int(data.conversation(index)[1][1:].sum()) for index in range(data.num_conversations))
        chosen = range(min(num_shown, data.num_conversations))
        documents = [render(data.conversation(index), tokenizer, most=RENDERED_TOKENS) for index in chosen]
        histogram = length_histogram("conversations", data.lengths)
    samples, bad = tuple(map(_single, chosen, documents)), data.bad_rows
    return TextFileFacts(
        path, "chat", size, learned, histogram, bad.count, tuple(bad.first), samples, tuple(data.notes)
    )


def _labelled_file(found: FoundSource, tokenizer_path: str, num_shown: int, size: int) -> TextFileFacts:
    """Return the facts about labelled rows, with the classes that they name."""
    with TemporaryDirectory() as directory:
        objective = guess_objective(found)
        request = DatasetRequest((found.source,), objective, _UNLIMITED, _UNLIMITED, tokenizer_path, Path(directory))
        data = open_labelled(request)
        tokenizer = load_tokenizer(tokenizer_path)
        shown = [
            render_row(index, *data.row(index), tokenizer, objective) for index in range(min(num_shown, len(data)))
        ]
        bad, lengths, counts = data.bad_rows, length_histogram("rows", data.lengths), data.class_counts
    learned = sum(counts.values())
    return TextFileFacts(
        found.source.path, "labelled", size, learned, lengths, bad.count, tuple(bad.first), tuple(shown), classes=counts
    )


def _manifest(prefix: str) -> Mapping[str, Any] | None:
    """Return the manifest that `prepare` wrote; None if it is missing, or another file has its name."""
    try:
        content = read_json(Path(f"{prefix}.json"), DATA_RECORD, DataError)
    except DataError:
        return None
    return content if isinstance(content, dict) and CHECKSUMS in content else None


def _problems(file: IndexedFile, manifest: Mapping[str, Any], fast: bool) -> Iterator[str]:
    for name, found in (("num_documents", file.num_documents), ("num_tokens", file.num_tokens)):
        if name in manifest and manifest[name] != found:
            yield f"{file.prefix}.json says {name}={manifest[name]}, but there are {found}"
    for suffix, expected in () if fast else manifest[CHECKSUMS].items():
        path = Path(f"{file.prefix}.{suffix}")
        if (checksum := file_xxh3(path)) != expected:
            yield f"{path} has the checksum {checksum}, but {file.prefix}.json says {expected}"


def _require_known_ids(ids: np.ndarray, vocab_size: int, tokenizer_path: str, name: str) -> np.ndarray:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise DataError(
            f"data: {name}: holds the id {wrong[0]}, but the tokenizer {tokenizer_path} has {vocab_size}; give the "
            "tokenizer that the data were prepared with"
        )
    return ids


def _format_of(found: FoundSource) -> str:
    """Return the format of a source, judged by its first example."""
    bad = found.source.bad_rows()
    first = next(parse_examples(found, lambda located: located, bad), None)
    if first is None:
        bad.refuse_all(found.source)
        raise DataError(f"data: {found.source}: no rows; each line must hold one object")
    names = first.columns.keys()
    if is_conversation(set(names)):
        return "chat"
    if is_labelled(names):
        return "labelled"
    if TEXT_COLUMN in names:
        return "text"
    hint = "; inspect the run file of a run that trains on it" if "input_ids" in names else ""
    raise DataError(
        f"data: {first.where}: neither text nor messages nor prompt and completion, only "
        f"{', '.join(sorted(names)) or 'an empty object'}{hint}"
    )


def _texts(
    source: Source, tokenizer_path: str, num_shown: int
) -> tuple[np.ndarray, BadRows, tuple[RenderedSample, ...]]:
    """Return the lengths of the documents, the rows that were left out, and the first documents."""
    tokenizer = load_tokenizer(tokenizer_path)
    lengths: list[int] = []
    shown: list[RenderedSample] = []
    bad = source.bad_rows()
    documents = TextSource(source).documents(bad)
    while batch := list(islice(documents, _BATCH)):
        for ids in encode_documents(tokenizer, batch):
            if len(shown) < num_shown:
                tokens = ids, np.zeros(len(ids), dtype=bool)
                shown.append(_single(len(lengths), render(tokens, tokenizer, most=RENDERED_TOKENS)))
            lengths.append(len(ids))
    if not lengths:
        bad.refuse_all(source)
        raise DataError(f"data: {source}: no documents; each line must hold one")
    return np.asarray(lengths), bad, tuple(shown)


def _single(index: int, document: RenderedDocument) -> RenderedSample:
    return RenderedSample(index, (document,))
