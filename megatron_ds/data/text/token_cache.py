"""Token cache: texts are tokenized once, and the ids kept under a hash of the text and of the tokenizer.

Every rank calls this at start-up, without communication. A file lock lets one rank tokenize while the others of its
machine wait. `<key>.bin` holds the ids, `<key>.lengths` the number of them in each document (earlier versions did not
write it), `<key>.json` their number and dtype; each gets its name when it is complete. Moving or touching a text keeps
its key, changing a byte changes it.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.long_text import encode_documents
from megatron_ds.data.readers.tokenizer import largest_token_id, tokenizer_digest
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger

FORMAT_VERSION = 1
_BATCH_CHARACTERS = 1 << 21  # bounds memory
_BATCH_DOCUMENTS = 4096
_LENGTH = "<i8"  # dtype of a document's length


@dataclass(frozen=True)
class TokenInfo:
    """The sidecar (`<key>.json`) of a token file; `bad` are places, without the source's name, and reasons."""

    format_version: int
    dtype: str
    num_tokens: int
    num_documents: int
    largest_id: int
    num_bad: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CachedTokens:
    """The ids of one source.

    Attributes:
        key: hash of their content.
        tokens: (T,) uint16 or uint32, memory-mapped.
        info: the sidecar.
        bad_rows: account of the rows that were left out.
        lengths: (documents,) int64, memory-mapped: ids of each document; None = not asked for.
    """

    key: str
    tokens: np.ndarray
    info: TokenInfo
    bad_rows: BadRows
    lengths: np.ndarray | None = None


class _Frame(NamedTuple):
    """Ids before and after each document."""

    begin_ids: tuple[int, ...]
    end_id: int


def cached_tokens(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
    directory: Path,
    begin_ids: Sequence[int] = (),
    *,
    with_lengths: bool = False,
) -> CachedTokens:
    """Return the tokens of `source`: each document that is not empty between `begin_ids` and `end_id`, and no other
    special token.

    Reads the source once to hash it; tokenizes it only if `directory` does not hold all of its tokens yet. Safe for
    concurrent processes.

    Raises:
        DataError: the source is malformed, or `directory` cannot be written.
    """
    content = f"{FORMAT_VERSION}\n{source.digest()}\n{tokenizer_digest(tokenizer, end_id)}"
    if begin_ids:
        content += f"\nbegin={list(begin_ids)}"
    key = hashlib.sha256(content.encode()).hexdigest()
    frame = _Frame(tuple(begin_ids), end_id)
    info = _read_info(directory, key, with_lengths)
    if info is None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(directory / f"{key}.lock"):
                info = _read_info(
                    directory, key, with_lengths
                )  # another rank may have written it while this one waited
                if info is None:
                    get_logger("data").info("tokenizing %s", source.name)
                    info = _write_tokens(source, tokenizer, frame, directory, key)
        except OSError as error:
            raise DataError(
                f"data: the token cache {directory} cannot be written ({error}); "
                "set data.cache_dir to a writable directory with enough space"
            ) from error
    bad = source.bad_rows()
    bad.count, bad.first = info.num_bad, [source.prefix + one for one in info.bad]
    bad.require_skip(bad.skip)
    lengths = _map(directory / f"{key}.lengths", _LENGTH, info.num_documents) if with_lengths else None
    return CachedTokens(key, _map(directory / f"{key}.bin", info.dtype, info.num_tokens), info, bad, lengths)


def _read_info(directory: Path, key: str, with_lengths: bool) -> TokenInfo | None:
    """Return the sidecar, or None where it or a file that is needed is missing, damaged or of the wrong size."""
    try:
        info = TokenInfo(**json.loads((directory / f"{key}.json").read_text(encoding="utf-8")))
        size = (directory / f"{key}.bin").stat().st_size
        intact = size == info.num_tokens * np.dtype(info.dtype).itemsize
        if with_lengths:
            size = (directory / f"{key}.lengths").stat().st_size
            intact = intact and size == info.num_documents * np.dtype(_LENGTH).itemsize
    except (OSError, ValueError, TypeError):
        return None
    return info if intact and info.format_version == FORMAT_VERSION else None


def _write_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, frame: _Frame, directory: Path, key: str
) -> TokenInfo:
    """Write `<key>.lengths`, `<key>.bin`, then `<key>.json`, each under a temporary name. The caller holds the lock."""
    dtype = np.dtype("<u2" if max(largest_token_id(tokenizer), frame.end_id) < 1 << 16 else "<u4")
    num_tokens = num_documents = 0
    largest_id = -1
    # The lock may not hold across machines on a shared disk: their temporary names differ, and both write the same.
    temporary = directory / f"{key}.{socket.gethostname()}.tmp"
    lengths = temporary.with_suffix(".lengths.tmp")
    bad = source.bad_rows()
    try:
        with temporary.open("wb") as file, lengths.open("wb") as lengths_file:
            for batch in _batches(source.documents(bad)):
                documents = _encode(tokenizer, batch, frame)
                ids = np.concatenate(documents)
                file.write(ids.astype(dtype).tobytes())
                lengths_file.write(np.asarray([len(one) for one in documents], dtype=_LENGTH).tobytes())
                num_tokens += len(ids)
                num_documents += len(batch)
                largest_id = max(largest_id, int(ids.max()))
            for written in (file, lengths_file):
                written.flush()
                os.fsync(written.fileno())
        if not num_documents:
            bad.refuse_all(source.name)
        named = [one.removeprefix(source.prefix) for one in bad.first]
        info = TokenInfo(FORMAT_VERSION, dtype.str, num_tokens, num_documents, largest_id, bad.count, named)
        lengths.replace(directory / f"{key}.lengths")
        temporary.replace(directory / f"{key}.bin")
        temporary.write_text(json.dumps(asdict(info)) + "\n", encoding="utf-8")
        temporary.replace(directory / f"{key}.json")
    finally:
        temporary.unlink(missing_ok=True)
        lengths.unlink(missing_ok=True)
    return info


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Yield documents that are not empty, in lists bounded in number and in characters."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        if not document:
            continue
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: PreTrainedTokenizerBase, batch: list[str], frame: _Frame) -> list[np.ndarray]:
    """Return the ids of each document in its frame: (T,) int64."""
    begin, end = (np.asarray(ids, dtype=np.int64) for ids in (frame.begin_ids, [frame.end_id]))
    return [np.concatenate([begin, ids, end]) for ids in encode_documents(tokenizer, batch)]


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    if size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
