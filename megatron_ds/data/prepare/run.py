"""`megatron-ds prepare`: sources and a tokenizer -> PREFIX.bin, PREFIX.idx and a manifest, PREFIX.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.indexed.files import IndexedFile, index_path, token_dtype, tokens_path
from megatron_ds.data.prepare.chunks import CHUNK_BYTES, CHUNK_ROWS, Chunk, cut, identity
from megatron_ds.data.prepare.journal import Journal, State, complete
from megatron_ds.data.prepare.workers import Encoding, encode_all
from megatron_ds.data.readers.tokenizer import largest_token_id, load_tokenizer, special_id, tokenizer_digest
from megatron_ds.errors import DataError
from megatron_ds.version import __version__

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PrepareOptions:
    """What is made of what.

    Attributes:
        sources: files, directories, saved `datasets` or hub ids.
        tokenizer: directory.
        prefix: of the output.
        workers: processes.
        column: the field that holds the text, of JSON lines and tables.
        append_eod: whether the tokenizer's eos follows each document.
        skip_bad: go on without what is no document.
        overwrite: replace other data of the same prefix.
        anew: do not go on with what an earlier try left.
    """

    sources: Sequence[str]
    tokenizer: str
    prefix: str
    workers: int
    column: str = "text"
    append_eod: bool = True
    skip_bad: bool = False
    overwrite: bool = False
    anew: bool = False


@dataclass(frozen=True)
class Prepared:
    """What came of it.

    Attributes:
        manifest: the content of PREFIX.json.
        was_there: nothing had to be done.
    """

    manifest: dict[str, Any]
    was_there: bool = False


def prepare(
    options: PrepareOptions,
    tell: Callable[[str], None] = lambda line: None,
    show: Callable[[State, int], None] = lambda state, total: None,
) -> Prepared:
    """Tokenise the sources. Cut in the middle, the same call goes on where it was.

    Args:
        options: what is made of what.
        tell: takes a line worth saying.
        show: takes the state, before the first chunk and after each, and the bytes that there are to read.

    Raises:
        DataError: a source or the tokenizer cannot be read, documents are malformed, or the output cannot be written.
        LaunchError: a worker died.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    encoding = _encoding(options, tokenizer)
    chunks = cut(options.sources)
    if not chunks:
        raise DataError(f"data: {', '.join(options.sources)}: nothing to read; each line or row must hold a document")
    manifest = _manifest(options, encoding, tokenizer, chunks)
    key = _key(manifest)
    there = _there(options, key)
    if there is not None:
        return Prepared(there, was_there=True)
    with Journal(options.prefix, key, options.anew) as journal:
        state, total = journal.state, sum(chunk.bytes for chunk in chunks)
        if journal.began_anew:
            tell(f"begins anew: {journal.began_anew}")
        elif state.chunks:
            tell(f"goes on after {state.documents:,} documents, {state.bytes / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        show(state, total)
        left = chunks[state.chunks :]
        with closing(encode_all(left, tokenizer, encoding, options.workers)) as results:
            for chunk, encoded in zip(left, results, strict=True):
                journal.add(chunk, encoded)
                show(state, total)
        if state.num_bad and not options.skip_bad:
            raise DataError(_bad_words(state))
        if state.documents == 0:
            raise DataError(f"data: {', '.join(options.sources)}: no documents")
        counted = {
            "key": key,
            "num_documents": state.documents,
            "num_tokens": state.tokens,
            "largest_id": state.largest_id,
            "longest_document": state.longest,
            "bad_lines": {"count": state.num_bad, "first": state.bad},
        }
        return Prepared(journal.finish(np.dtype(encoding.dtype), {**manifest, **counted}))


def _key(manifest: dict[str, Any]) -> str:
    """Stands for what is made of what; names are not part of it: files may be moved."""
    sources = [{name: value for name, value in source.items() if name != "name"} for source in manifest["sources"]]
    decides = {**manifest, "sources": sources, "tokenizer": manifest["tokenizer"]["sha256"]}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _encoding(options: PrepareOptions, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    end_id = None
    if options.append_eod:
        use = "each document is ended with it (--no-eod leaves that out)"
        end_id = special_id(tokenizer, options.tokenizer, "eos_token", use)
    size = max(largest_token_id(tokenizer), end_id or 0) + 1
    return Encoding(options.column, end_id, token_dtype(size).str)


def _manifest(
    options: PrepareOptions, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, chunks: Sequence[Chunk]
) -> dict[str, Any]:
    """All that decides what is written, and is known before."""
    return {
        "format_version": FORMAT_VERSION,
        "megatron_ds": __version__,
        "sources": identity(chunks),
        "tokenizer": {
            "path": Path(options.tokenizer).name,
            "sha256": tokenizer_digest(tokenizer, encoding.end_id if encoding.end_id is not None else -1),
        },
        "column": options.column,
        "end_id": encoding.end_id,
        "dtype": encoding.dtype,
        "chunks": [CHUNK_BYTES, CHUNK_ROWS],
    }


def _there(options: PrepareOptions, key: str) -> dict[str, Any] | None:
    """The manifest of the same data where they are whole already.

    Raises:
        DataError: other data have the prefix, or something else than a directory is in its way.
    """
    prefix = options.prefix
    if prefix.endswith("/") or Path(prefix).name in ("", ".", ".."):
        raise DataError(f"--output={prefix} names a directory; give a name in it, such as {Path(prefix) / 'corpus'}")
    complete(prefix)
    files = [tokens_path(prefix), index_path(prefix), Path(f"{prefix}.json")]
    there = [file for file in files if file.exists()]
    if not there:
        return None
    try:
        manifest = json.loads(files[2].read_text(encoding="utf-8"))
        same = manifest["key"] == key and (options.skip_bad or not manifest["bad_lines"]["count"])
        IndexedFile(prefix)
    except (OSError, ValueError, KeyError, TypeError, DataError):  # not there, or damaged
        manifest, same = {}, False
    if same and len(there) == len(files) and not options.anew:
        return manifest
    if options.overwrite or (same and options.anew):
        return None
    raise DataError(
        f"--output={prefix}: {there[0]} is there, of other data; choose another prefix, or give --overwrite"
        if len(there) == len(files)
        else f"--output={prefix}: {there[0]} is there, and {next(f for f in files if f not in there)} is not; remove "
        "it, or give --overwrite"
    )


def _bad_words(state: State) -> str:
    of = state.num_bad + state.documents
    return (
        f"{state.num_bad:,} of {of:,} documents cannot be used, the first at {state.bad[0]}; mend them, or give "
        "--skip-bad to go on without them (what is done is kept)"
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
