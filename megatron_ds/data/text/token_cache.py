"""Token cache: texts are tokenized once, and the ids kept under a hash of the text and of the tokenizer.

Every rank calls this at start-up, without communication. A file lock lets one rank tokenize while the others of its
machine wait. `<key>.bin` holds the ids, `<key>.lengths` the number of them in each document, `<key>.json` their number
and dtype, `<key>.checksums` the checksums of all three; each gets its name when it is complete. Earlier versions wrote
neither lengths nor checksums. Moving or touching a text keeps its key, changing a byte changes it. Damaged tokens are
made again, which is logged.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.atomic import replacing
from megatron_ds.data.readers.array_cache import note_earlier
from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.cache_checksums import (
    DamagedEntry,
    compare_checksums,
    refuse_strangers,
    write_checksums,
)
from megatron_ds.data.readers.long_text import encode_documents
from megatron_ds.data.readers.tokenizer import largest_token_id, tokenizer_digest
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import DataError
from megatron_ds.locks import FileLock
from megatron_ds.log import get_logger
from megatron_ds.untrusted import read_record
from megatron_ds.untrusted.limits import CACHE_RECORD

FORMAT_VERSION = 1
_BATCH_CHARACTERS = 1 << 21  # bounds memory
_BATCH_DOCUMENTS = 4096
_LENGTH = "<i8"  # dtype of a document's length
_DTYPES = ("<u2", "<u4")  # of ids below 2^16, and of others


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
    damage = ""
    try:
        info, _ = _read_info(directory, key, with_lengths)
        if info is None:
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / f"{key}.lock"):
                # another rank may have written it while this one waited
                info, damage = _read_info(directory, key, with_lengths)
                if info is None:
                    if damage:
                        get_logger("data").warning(
                            "the tokens of %s in the cache %s are damaged (%s): tokenizing again",
                            source.name,
                            directory,
                            damage,
                        )
                    get_logger("data").info("tokenizing %s", source.name)
                    info = _write_tokens(source, tokenizer, frame, directory, key)
    except OSError as error:
        problem = f"{error}{damage and f'; its tokens are damaged: {damage}'}"
        raise DataError(
            f"data: the token cache {directory} cannot be written ({problem}); "
            "set data.cache_dir to a writable directory with enough space"
        ) from error
    bad = source.bad_rows()
    bad.count, bad.first = info.num_bad, [source.prefix + one for one in info.bad]
    bad.require_skip(bad.skip)
    lengths = _map(directory / f"{key}.lengths", _LENGTH, info.num_documents) if with_lengths else None
    return CachedTokens(key, _map(directory / f"{key}.bin", info.dtype, info.num_tokens), info, bad, lengths)


def _read_info(directory: Path, key: str, with_lengths: bool) -> tuple[TokenInfo | None, str]:
    """Return the sidecar, and the damage: None and an empty text where files that are needed were never written."""
    endings = ("bin", "json", *(["lengths"] if with_lengths else []))
    files, checksums = {ending: directory / f"{key}.{ending}" for ending in endings}, directory / f"{key}.checksums"
    try:
        refuse_strangers(directory, files.values())
        has_checksums = compare_checksums(checksums, files)
        info = read_record(files["json"], TokenInfo, CACHE_RECORD, DamagedEntry)
        if info.format_version != FORMAT_VERSION or info.dtype not in _DTYPES:
            raise DamagedEntry("json holds other values than are written")
        sizes = {"bin": (info.num_tokens, info.dtype), "lengths": (info.num_documents, _LENGTH)}
        for name in files.keys() & sizes.keys():
            count, dtype = sizes[name]
            if files[name].stat().st_size != count * np.dtype(dtype).itemsize:
                raise DamagedEntry(f"{name} has not the size that json says")
    except FileNotFoundError:
        return None, ""
    except DamagedEntry as problem:
        is_known = all(file.exists() for file in files.values())
        return None, str(problem) if is_known else ""
    if not has_checksums:
        note_earlier(files["bin"])
        with suppress(OSError):  # a cache that cannot be written
            _write_checksums(directory, key)
    return info, ""


def _write_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, frame: _Frame, directory: Path, key: str
) -> TokenInfo:
    """Write the files of an entry, each under a temporary name, `<key>.json` as the last. The caller holds the lock.

    The lock may not hold across machines on a shared disk: all of them write the same.
    """
    dtype = np.dtype(_DTYPES[max(largest_token_id(tokenizer), frame.end_id) >= 1 << 16])
    num_tokens = num_documents = 0
    largest_id = -1
    bad = source.bad_rows()
    with ExitStack() as stack:
        ids_file, lengths_file = (
            stack.enter_context(replacing(directory / f"{key}.{ending}", durable=True)) for ending in ("bin", "lengths")
        )
        with ids_file.open("wb") as file, lengths_file.open("wb") as lengths:
            for batch in _batches(source.documents(bad)):
                documents = _encode(tokenizer, batch, frame)
                ids = np.concatenate(documents)
                file.write(ids.astype(dtype).tobytes())
                lengths.write(np.asarray([len(one) for one in documents], dtype=_LENGTH).tobytes())
                num_tokens += len(ids)
                num_documents += len(batch)
                largest_id = max(largest_id, int(ids.max()))
        if not num_documents:
            bad.refuse_all(source.name)
    named = [one.removeprefix(source.prefix) for one in bad.first]
    info = TokenInfo(FORMAT_VERSION, dtype.str, num_tokens, num_documents, largest_id, bad.count, named)
    with replacing(directory / f"{key}.json") as temporary:
        temporary.write_text(json.dumps(asdict(info)) + "\n", encoding="utf-8")
        _write_checksums(directory, key, temporary)
    return info


def _write_checksums(directory: Path, key: str, info: Path | None = None) -> None:
    """Write the checksums of an entry's files; `info` is the sidecar before it gets its name."""
    files = {ending: directory / f"{key}.{ending}" for ending in ("bin", "lengths", "json")}
    files["json"] = info or files["json"]
    found = {name: file for name, file in files.items() if file.exists()}
    write_checksums(directory / f"{key}.checksums", found)


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
