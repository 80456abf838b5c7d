"""What data hold: indexed files, files of text or conversations, and the data of a run as it takes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash

from megatron_ds.data.chat import open_chat
from megatron_ds.data.chat.dataset import ChatDataset
from megatron_ds.data.dataset import Dataset
from megatron_ds.data.indexed.files import IndexedFile, index_path, tokens_path
from megatron_ds.data.inspect.histogram import Lengths, measure
from megatron_ds.data.inspect.rendering import (
    Document,
    ShownSample,
    first_samples,
    learned_of,
    length_of,
    show,
    show_sample,
)
from megatron_ds.data.objective import Causal, Objective
from megatron_ds.data.options import ChatOptions
from megatron_ds.data.readers.examples import each_row
from megatron_ds.data.readers.sources import JSON_SUFFIXES
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.data.sampler import GlobalBatches
from megatron_ds.data.text.corpus import TextSource
from megatron_ds.errors import DataError

LOOKED_AT = 1024
"""So many samples, evenly spaced, tell how much of the data carries loss."""
CHECKSUMS = "xxh3_128"
SHOWN_TOKENS = 512  # of a document; some are books
_ANY = 1 << 40  # as a length or a vocabulary: no limit
_READ_BYTES = 1 << 22
_BATCH = 256


@dataclass(frozen=True)
class IndexedFacts:
    """A pair of indexed files.

    Attributes:
        prefix: of both.
        documents, sequences, tokens: how many; a sequence is a document, unless the files were made otherwise.
        dtype: of a token.
        tokens_bytes, index_bytes: sizes of `.bin` and `.idx`.
        lengths: of the documents; None = there are none.
        manifest: what was written beside them when they were prepared; None = nothing.
        problems: a line for each thing that is not as the manifest says.
        checked: whether checksums were looked at.
        shown: the first documents.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    tokens_bytes: int
    index_bytes: int
    lengths: Lengths | None
    manifest: Mapping[str, Any] | None
    problems: tuple[str, ...]
    checked: bool
    shown: tuple[ShownSample, ...]


@dataclass(frozen=True)
class FileFacts:
    """A file of text or of conversations, as a tokenizer cuts it; `learned` is the tokens that would carry loss."""

    path: str
    format: str
    bytes: int
    learned: int
    lengths: Lengths
    shown: tuple[ShownSample, ...]


@dataclass(frozen=True)
class RunDataFacts:
    """The data of a run.

    Attributes:
        training, validation: in a line; None = no validation.
        fingerprint: of the training data.
        columns: of a sample.
        samples: of the training data.
        positions: of a sample, those of a decoder beside an encoder included.
        global_batch_size: samples of a step.
        looked_at: so many samples tell `learned`.
        learned: tokens under loss of a sample, on average.
        lengths: of what the samples are made of; None = samples are cut out of a stream.
        shown: those that the run takes first, none twice.
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
    lengths: Lengths | None
    shown: tuple[ShownSample, ...]


@runtime_checkable
class _OfLengths(Protocol):
    @property
    def lengths(self) -> np.ndarray:
        """In tokens: (n,)."""


def inspect_run_data(
    data: Dataset,
    valid: Dataset | None,
    order: GlobalBatches,
    objective: Objective,
    tokenizer_path: str | None,
    num_shown: int,
) -> RunDataFacts:
    """Look at the data of a run.

    Args:
        data, valid: as the run opens them.
        order: in which it takes the former.
        objective: what the model is trained to do.
        tokenizer_path: None = ids are shown.
        num_shown: how many samples.

    Raises:
        DataError: the tokenizer, or a sample that is looked at, cannot be read.
    """
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path is not None and num_shown else None
    looked_at = min(len(data), LOOKED_AT)
    learned, found = _look(data, np.linspace(0, len(data) - 1, looked_at).astype(np.int64).tolist())
    is_causal = isinstance(objective, Causal)
    lengths: Lengths | None = None
    if isinstance(data, _OfLengths):
        lengths = measure("conversations" if isinstance(data, ChatDataset) else "documents", data.lengths)
    elif found.min() < data.seq_length:
        lengths = measure("examples" if looked_at == len(data) else f"{looked_at} examples", found)
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
        shown=tuple(
            show_sample(index, sample, tokenizer, is_causal)
            for index, sample in first_samples(data, order, min(num_shown, len(data)))
        ),
    )


def _look(data: Dataset, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels under loss and input positions that are no padding, of some samples."""
    found = []
    for index in indices:
        sample = data.sample(index)
        found.append((learned_of(sample), length_of(sample)))
    learned, lengths = np.asarray(found).T
    return learned, lengths


def inspect_indexed(source: str, *, fast: bool, tokenizer_path: str | None, num_shown: int) -> IndexedFacts:
    """Look at a pair of indexed files.

    Args:
        source: their prefix, or one of them.
        fast: leave their checksums alone.
        tokenizer_path: None = no document is shown.
        num_shown: how many documents.

    Raises:
        DataError: they cannot be read at all.
    """
    file = IndexedFile(source)
    ends = np.concatenate([[0], np.cumsum(file.lengths, dtype=np.int64)])
    lengths = np.diff(ends[file.document_indices])
    manifest = _manifest(file.prefix)
    shown = []
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path)
        for number in range(min(num_shown, file.num_documents)):
            sequences = range(int(file.document_indices[number]), int(file.document_indices[number + 1]))
            ids = np.concatenate([np.empty(0, np.int64), *(file.read(sequence) for sequence in sequences)])
            ids = _require_known(ids.astype(np.int64), len(tokenizer), tokenizer_path, file.prefix)
            learned = np.zeros(len(ids), dtype=bool)
            shown.append(ShownSample(number, (show((ids, learned), tokenizer, most=SHOWN_TOKENS),)))
    return IndexedFacts(
        prefix=file.prefix,
        documents=file.num_documents,
        sequences=len(file),
        tokens=file.num_tokens,
        dtype=file.dtype.name,
        tokens_bytes=tokens_path(file.prefix).stat().st_size,
        index_bytes=index_path(file.prefix).stat().st_size,
        lengths=measure("documents", lengths) if len(lengths) else None,
        manifest=manifest,
        problems=tuple(_problems(file, manifest, fast)) if manifest is not None else (),
        checked=manifest is not None and not fast,
        shown=tuple(shown),
    )


def inspect_file(path: str, tokenizer_path: str, num_shown: int) -> FileFacts:
    """Look at a file of text or conversations.

    Raises:
        DataError: it is neither, or the tokenizer does not fit it.
    """
    size = Path(path).stat().st_size
    if _format_of(path) == "text":
        found, learned, shown = _texts(path, tokenizer_path, num_shown)
        return FileFacts(path, "text", size, learned, measure("documents", found), shown)
    with TemporaryDirectory() as directory:
        data = open_chat([path], Causal(), _ANY, _ANY, tokenizer_path, directory, ChatOptions())
        tokenizer = load_tokenizer(tokenizer_path)
        learned = sum(int(data.conversation(index)[1][1:].sum()) for index in range(data.num_conversations))
        chosen = range(min(num_shown, data.num_conversations))
        documents = [show(data.conversation(index), tokenizer, most=SHOWN_TOKENS) for index in chosen]
        lengths = measure("conversations", data.lengths)
    return FileFacts(path, "chat", size, learned, lengths, tuple(map(_alone, chosen, documents)))


def _manifest(prefix: str) -> Mapping[str, Any] | None:
    """What `prepare` wrote; None where there is nothing, or something else of that name."""
    try:
        content = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and CHECKSUMS in content else None


def _problems(file: IndexedFile, manifest: Mapping[str, Any], fast: bool) -> Iterator[str]:
    for name, found in (("num_documents", file.num_documents), ("num_tokens", file.num_tokens)):
        if name in manifest and manifest[name] != found:
            yield f"{file.prefix}.json says {name}={manifest[name]}, and there are {found}"
    for suffix, expected in () if fast else manifest[CHECKSUMS].items():
        path = Path(f"{file.prefix}.{suffix}")
        digest = xxhash.xxh3_128()
        with path.open("rb") as opened:
            while chunk := opened.read(_READ_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            yield f"{path} has the checksum {digest.hexdigest()}, {file.prefix}.json says {expected}"


def _require_known(ids: np.ndarray, vocab_size: int, tokenizer_path: str, name: str) -> np.ndarray:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise DataError(
            f"data: {name}: holds the id {wrong[0]}, and the tokenizer {tokenizer_path} has {vocab_size}; name the "
            "tokenizer that the data were prepared with"
        )
    return ids


def _format_of(path: str) -> str:
    """Of what is in a file, by its first row."""
    if Path(path).suffix.lower() not in JSON_SUFFIXES:
        return "text"
    first = next(each_row(path), None)
    if first is None:
        raise DataError(f"data: {path}: no rows; each line must hold one object")
    names = first.columns.keys()
    if "messages" in names or {"prompt", "completion"} <= names:
        return "chat"
    if "text" in names:
        return "text"
    hint = "; inspect the run file of a run that trains on it" if "input_ids" in names else ""
    raise DataError(
        f"data: {first.where}: neither text nor messages nor prompt and completion, only "
        f"{', '.join(sorted(names)) or 'an empty object'}{hint}"
    )


def _texts(path: str, tokenizer_path: str, num_shown: int) -> tuple[np.ndarray, int, tuple[ShownSample, ...]]:
    """Lengths of the documents, the tokens in all, and the first documents."""
    tokenizer = load_tokenizer(tokenizer_path)
    lengths: list[int] = []
    shown: list[ShownSample] = []
    documents = iter(TextSource(path).documents())
    while batch := list(islice(documents, _BATCH)):
        encoded: Sequence[list[int]] = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            if len(shown) < num_shown:
                tokens = np.asarray(ids, dtype=np.int64), np.zeros(len(ids), dtype=bool)
                shown.append(_alone(len(lengths), show(tokens, tokenizer, most=SHOWN_TOKENS)))
            lengths.append(len(ids))
    if not lengths:
        raise DataError(f"data: {path}: no documents; each line must hold one")
    return np.asarray(lengths), sum(lengths), tuple(shown)


def _alone(index: int, document: Document) -> ShownSample:
    return ShownSample(index, (document,))
