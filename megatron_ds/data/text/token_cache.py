"""Texts are tokenised once: the ids lie in a cache named after the content of the text and of the tokenizer.

Every rank calls this at start-up; nothing is communicated. A file lock lets one rank tokenise while the others
of its machine wait; the rest is files: `<key>.bin` holds the ids, `<key>.json` says how many there must be, and both
appear under their names only when they are whole. Moving or touching a text keeps its key, changing a byte changes it.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.cache import cache_folder
from megatron_ds.data.readers.tokenizer import largest_token_id, tokenizer_digest
from megatron_ds.data.text.corpus import TextSource
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger

FORMAT_VERSION = 1
_BATCH_CHARACTERS = 1 << 21  # bounds what is held at once; a longer document is still encoded whole
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class TokenInfo:
    """The sidecar of a token file."""

    format_version: int
    dtype: str
    num_tokens: int
    num_documents: int
    largest_id: int


@dataclass(frozen=True)
class CachedTokens:
    """The ids of one source: (T,) uint16 or uint32, memory-mapped, and the key that stands for their content."""

    key: str
    tokens: np.ndarray
    info: TokenInfo


def default_cache_dir() -> Path:
    """Where tokens are kept unless a run says otherwise."""
    return cache_folder("tokens")


def cached_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase, end_id: int, directory: Path) -> CachedTokens:
    """The tokens of `source` without special tokens, `end_id` after each document that is not empty.

    Reads the source once to hash it; tokenises it only where `directory` does not hold its tokens yet, whole. Safe to
    call from any number of processes at once.

    Raises:
        DataError: the source is malformed, or `directory` cannot be written.
    """
    content = f"{FORMAT_VERSION}\n{source.digest()}\n{tokenizer_digest(tokenizer, end_id)}"
    key = hashlib.sha256(content.encode()).hexdigest()
    info = _read_info(directory, key)
    if info is None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(directory / f"{key}.lock"):
                info = _read_info(directory, key)  # another rank may have written it while this one waited
                if info is None:
                    get_logger("data").info("tokenising %s", source.name)
                    info = _write_tokens(source, tokenizer, end_id, directory, key)
        except OSError as error:
            raise DataError(
                f"data: the token cache {directory} cannot be written ({error}); "
                "set data.cache_dir to a writable directory with enough space"
            ) from error
    return CachedTokens(key, _map_tokens(directory / f"{key}.bin", info), info)


def _read_info(directory: Path, key: str) -> TokenInfo | None:
    """The sidecar, or None where it or the token file is missing, damaged or of another size than it says."""
    try:
        info = TokenInfo(**json.loads((directory / f"{key}.json").read_text(encoding="utf-8")))
        size = (directory / f"{key}.bin").stat().st_size
        whole = size == info.num_tokens * np.dtype(info.dtype).itemsize
    except (OSError, ValueError, TypeError):
        return None
    return info if whole and info.format_version == FORMAT_VERSION else None


def _write_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, end_id: int, directory: Path, key: str
) -> TokenInfo:
    """Write `<key>.bin`, then `<key>.json`, each under a temporary name first. The caller holds the lock."""
    dtype = np.dtype("<u2" if max(largest_token_id(tokenizer), end_id) < 1 << 16 else "<u4")
    num_tokens = num_documents = 0
    largest_id = -1
    # The lock may not reach other machines on a shared disk: their temporary names differ, and both write the same.
    temporary = directory / f"{key}.{socket.gethostname()}.tmp"
    try:
        with temporary.open("wb") as file:
            for batch in _batches(source.documents()):
                ids = _encode(tokenizer, batch, end_id)
                file.write(ids.astype(dtype).tobytes())
                num_tokens += len(ids)
                num_documents += len(batch)
                largest_id = max(largest_id, int(ids.max()))
            file.flush()
            os.fsync(file.fileno())
        info = TokenInfo(FORMAT_VERSION, dtype.str, num_tokens, num_documents, largest_id)
        temporary.replace(directory / f"{key}.bin")
        temporary.write_text(json.dumps(asdict(info)) + "\n", encoding="utf-8")
        temporary.replace(directory / f"{key}.json")
    finally:
        temporary.unlink(missing_ok=True)
    return info


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents that are not empty, in lists bounded in number and in characters."""
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


def _encode(tokenizer: PreTrainedTokenizerBase, batch: list[str], end_id: int) -> np.ndarray:
    """The ids of all documents, each followed by `end_id`, as one (T,) int64. Fast tokenizers use every core."""
    encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    pieces = [np.asarray([*ids, end_id], dtype=np.int64) for ids in encoded]
    return np.concatenate(pieces)


def _map_tokens(path: Path, info: TokenInfo) -> np.ndarray:
    if info.num_tokens == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=info.dtype)
    return np.memmap(path, dtype=info.dtype, mode="r")
