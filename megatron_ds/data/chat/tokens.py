"""Conversations as tokens: ids, and which of them carry loss, computed once and cached by content."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.chat.conversations import Conversation, read_conversations
from megatron_ds.data.chat.rendering import ChatTemplate, Rendered
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.readers.digests import file_sha256
from megatron_ds.data.readers.sources import JSON_SUFFIXES, FileSource, find_source
from megatron_ds.data.readers.tokenizer import tokenizer_digest
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger

FORMAT_VERSION = 1
_BATCH = 512
_ARRAYS = ("ids", "learned", "starts", "places")


@dataclass(frozen=True)
class Conversations:
    """The conversations of one source as tokens, memory-mapped, one after the other.

    Attributes:
        key: hash of their content.
        name: the source.
        ids: (T,) int32.
        learned: (T,) bool: tokens with loss.
        starts: (n + 1,) int64: start of each conversation, and the end of the last.
        places: (n,) place of each in the source, such as `:7`; follows the source's name in errors.
    """

    key: str
    name: str
    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, in tokens."""
        return np.diff(self.starts)

    def where(self, index: int) -> str:
        """Return file and line of a conversation, for errors."""
        return f"{_prefix(self.name)}{self.places[index]}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's ids (L,) int64, and which tokens carry loss (L,) bool."""
        start, stop = self.starts[index], self.starts[index + 1]
        return self.ids[start:stop].astype(np.int64), np.asarray(self.learned[start:stop])


def cached_conversations(
    source: str, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, template: ChatTemplate, directory: Path
) -> Conversations:
    """Return the conversations of a source, tokenized unless `directory` holds them already. Safe for concurrent
    processes.

    Raises:
        DataError: the source is malformed, the template does not fit it, or `directory` cannot be written.
    """
    content = f"{FORMAT_VERSION}\n{_digest(source)}\n{tokenizer_digest(tokenizer, -1)}\n{template.identity}"
    key = hashlib.sha256(content.encode()).hexdigest()
    arrays = cached_arrays(directory, f"{key}.chat", _ARRAYS, lambda: _make(source, backend, template))
    return Conversations(key, source, **arrays)


def tokenize(rendered: Sequence[Rendered], backend: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids (L,) and loss mask (L,) of each text: tokens with a character in one of its spans carry loss.

    So does a token that begins before a span and ends in it, such as a space and a word.
    """
    for text, encoding in zip(rendered, backend.encode_batch([one.text for one in rendered], add_special_tokens=False)):
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        learned = np.zeros(len(offsets), dtype=bool)
        for start, end in text.spans:
            learned |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        yield np.asarray(encoding.ids, dtype=np.int32), learned


def offset_backend(tokenizer: PreTrainedTokenizerBase, path: str) -> Tokenizer:
    """Return the tokenizer's backend, with offsets that cover every character: some are configured to trim spaces.

    Raises:
        DataError: the tokenizer has no backend, and so no offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {path}: gives no positions of its tokens in the text, but data.format=chat needs them; "
            "convert it to a fast tokenizer (tokenizer.json)"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    _keep_spaces(content)
    backend = Tokenizer.from_str(json.dumps(content))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _keep_spaces(node: object) -> None:
    if isinstance(node, dict):
        if "trim_offsets" in node:
            node["trim_offsets"] = False
        for value in node.values():
            _keep_spaces(value)
    elif isinstance(node, list):
        for value in node:
            _keep_spaces(value)


def _make(source: str, backend: Tokenizer, template: ChatTemplate) -> dict[str, np.ndarray]:
    get_logger("data").info("tokenizing %s", source)
    ids, learned, lengths, places = [], [], [0], []
    for batch in _batches(read_conversations(source), _BATCH):
        texts = [template.render(one) for one in batch]
        for one, (tokens, mask) in zip(batch, tokenize(texts, backend)):
            ids.append(tokens)
            learned.append(mask)
            lengths.append(len(tokens))
            places.append(one.where.removeprefix(_prefix(source)))
    if not ids:
        raise DataError(f"data: {source}: no conversations; each line or row must hold one")
    return {
        "ids": np.concatenate(ids),
        "learned": np.concatenate(learned),
        "starts": np.cumsum(lengths, dtype=np.int64),
        "places": np.asarray(places),
    }


def _batches(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _prefix(source: str) -> str:
    """Return the name of a source in errors; it is not cached, as the data may be moved."""
    path = Path(source).expanduser()
    return str(path) if path.exists() else source


def _digest(source: str) -> str:
    """Return the SHA-256 of the content: bytes of files, columns of rows. Names, paths and times do not count."""
    found = find_source(source, JSON_SUFFIXES)
    digest = hashlib.sha256()
    if isinstance(found, FileSource):
        for path in found.paths:
            digest.update(f"file:{file_sha256(path)}\n".encode())
        return digest.hexdigest()
    for batch in found.table.iter(_BATCH):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()
