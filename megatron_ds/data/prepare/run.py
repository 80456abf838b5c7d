"""`megatron-ds prepare`: sources and a tokenizer -> PREFIX.bin, PREFIX.idx and a manifest, PREFIX.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.indexed.files import IndexedFile, index_path, token_dtype, tokens_path
from megatron_ds.data.prepare.chunks import CHUNK_BYTES, CHUNK_ROWS, Chunk, cut, identity
from megatron_ds.data.prepare.journal import Journal, State, complete
from megatron_ds.data.prepare.workers import Encoding, encode_all
from megatron_ds.data.readers.document_frame import Begin, document_frame
from megatron_ds.data.readers.examples import TEXT_COLUMN
from megatron_ds.data.readers.source import Source, as_source
from megatron_ds.data.readers.tokenizer import largest_token_id, load_tokenizer, tokenizer_digest
from megatron_ds.errors import DataError
from megatron_ds.untrusted import read_json
from megatron_ds.untrusted.limits import DATA_RECORD
from megatron_ds.version import __version__

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PrepareOptions:
    """Inputs, output and settings of `prepare`.

    Attributes:
        sources: files, directories, saved `datasets` or hub ids.
        tokenizer: directory of the tokenizer.
        prefix: of the output.
        workers: number of processes.
        column: the field of JSON lines and tables that holds the text.
        append_eod: whether the tokenizer's eos follows each document.
        bos: whether special tokens begin each document; "auto" = those that the tokenizer puts before a text.
        skip_bad: skip lines that hold no document.
        overwrite: replace other data of the same prefix.
        restart: discard unfinished output of an earlier run.
    """

    sources: Sequence[str | Source]
    tokenizer: str
    prefix: str
    workers: int
    column: str = "text"
    append_eod: bool = True
    skip_bad: bool = False
    overwrite: bool = False
    restart: bool = False
    bos: Begin = "auto"

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """The fields that are named otherwise in the data, as in `Source`."""
        return ((TEXT_COLUMN, self.column),) if self.column != TEXT_COLUMN else ()


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        manifest: the content of PREFIX.json.
        unchanged: True if the output existed already.
    """

    manifest: dict[str, Any]
    unchanged: bool = False


def prepare(
    options: PrepareOptions,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[State, int], None] = lambda state, total: None,
) -> Prepared:
    """Tokenise the sources. After an interruption, the same call continues where it stopped.

    Args:
        options: inputs, output and settings.
        log: called with each log line.
        progress: called with the state and the total bytes to read, before the first chunk and after each.

    Raises:
        DataError: a source or the tokenizer cannot be read, documents are malformed, or the output cannot be written.
        LaunchError: a worker died.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    encoding = _encoding(options, tokenizer)
    chunks = cut([replace(as_source(source), columns=options.columns) for source in options.sources])
    names = ", ".join(str(as_source(source)) for source in options.sources)
    if not chunks:
        raise DataError(f"data: {names}: nothing to read; each line or row must hold a document")
    manifest = _manifest(options, encoding, tokenizer, chunks)
    key = _key(manifest)
    _keep_others(options, chunks)
    existing = _existing_manifest(options, key, encoding.begin_ids)
    if existing is not None:
        return Prepared(existing, unchanged=True)
    with Journal(options.prefix, key, options.restart) as journal:
        state, total = journal.state, sum(chunk.bytes for chunk in chunks)
        if journal.discarded:
            log(f"starting over: {journal.discarded}")
        elif state.chunks:
            log(f"continuing after {state.documents:,} documents, {state.bytes / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        progress(state, total)
        left = chunks[state.chunks :]

        def report(done: float) -> None:
            size = chunks[state.chunks].bytes
            progress(replace(state, bytes=state.bytes + int(done * size)), total)

        with closing(encode_all(left, tokenizer, encoding, options.workers, report)) as results:
            for chunk, encoded in zip(left, results, strict=True):
                journal.add(chunk, encoded)
                progress(state, total)
        if state.num_bad and not options.skip_bad:
            raise DataError(_bad_lines_message(state))
        if state.documents == 0:
            bad = f"; all {state.num_bad:,} rows are bad, the first at {state.bad[0]}" if state.num_bad else ""
            raise DataError(f"data: {names}: no documents{bad}")
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
    """Return the hash of everything that decides the output; without names, as files may be moved."""
    sources = [{name: value for name, value in source.items() if name != "name"} for source in manifest["sources"]]
    decides = {**manifest, "sources": sources, "tokenizer": manifest["tokenizer"]["sha256"]}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _encoding(options: PrepareOptions, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    use = "each document is ended with it (--no-eod leaves that out)" if options.append_eod else None
    frame = document_frame(tokenizer, options.tokenizer, options.bos, use, field="--bos")
    size = max(largest_token_id(tokenizer), frame.end_id or 0, *frame.begin_ids) + 1
    return Encoding(options.column, frame.end_id, token_dtype(size).str, frame.begin_ids)


def _manifest(
    options: PrepareOptions, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, chunks: Sequence[Chunk]
) -> dict[str, Any]:
    """Return the part of the manifest that is known before reading; it decides the output."""
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
        **({"begin_ids": list(encoding.begin_ids)} if encoding.begin_ids else {}),
        "dtype": encoding.dtype,
        "chunks": [CHUNK_BYTES, CHUNK_ROWS],
    }


def _output_files(prefix: str) -> list[Path]:
    return [tokens_path(prefix), index_path(prefix), Path(f"{prefix}.json")]


def _keep_others(options: PrepareOptions, chunks: Sequence[Chunk]) -> None:
    """Refuse to replace a file that is read, such as the source corpus.json, or JSON that is no manifest of data.

    Raises:
        DataError: one of the output files is a source, or a tokenizer.json.
    """
    sources = {Path(chunk.path) for chunk in chunks}
    files = [file for file in _output_files(options.prefix) if file.exists()]
    for file in files:
        if any(source.exists() and file.samefile(source) for source in sources):
            raise DataError(f"--output={options.prefix} would replace {file}, which is read; choose another prefix")
        if file.suffix == ".json" and not _is_manifest(file):
            raise DataError(
                f"--output={options.prefix} would replace {file}, which is no manifest of data; choose another prefix"
            )


def _is_manifest(file: Path) -> bool:
    try:
        content = read_json(file, DATA_RECORD, DataError)
    except DataError:
        return False
    return isinstance(content, dict) and {"key", "format_version"} <= content.keys()


def _existing_manifest(options: PrepareOptions, key: str, begin_ids: Sequence[int]) -> dict[str, Any] | None:
    """Return the manifest of the same data if they are complete already.

    Raises:
        DataError: other data have the prefix, or the prefix is not the name of a file.
    """
    prefix = options.prefix
    if prefix.endswith("/") or Path(prefix).name in ("", ".", ".."):
        raise DataError(f"--output={prefix} names a directory; give a name in it, such as {Path(prefix) / 'corpus'}")
    complete(prefix)
    files = _output_files(prefix)
    existing = [file for file in files if file.exists()]
    if not existing:
        return None
    try:
        manifest = read_json(files[2], DATA_RECORD, DataError)
        same = manifest["key"] == key and (options.skip_bad or not manifest["bad_lines"]["count"])
        IndexedFile(prefix)
    except (KeyError, TypeError, DataError):  # missing or damaged
        manifest, same = {}, False
    if same and len(existing) == len(files) and not options.restart:
        return manifest
    if options.overwrite or (same and options.restart):
        return None
    raise DataError(
        f"--output={prefix}: {existing[0]} exists, with other data{_other_begin(manifest, begin_ids)}; choose another "
        "prefix, or give --overwrite"
        if len(existing) == len(files)
        else f"--output={prefix}: {existing[0]} exists, but {next(f for f in files if f not in existing)} does not; "
        "remove it, or give --overwrite"
    )


def _other_begin(manifest: dict[str, Any], begin_ids: Sequence[int]) -> str:
    """Return a hint if documents of the existing data begin otherwise; those of earlier versions have no beginning."""
    if not manifest or list(manifest.get("begin_ids", [])) == list(begin_ids):
        return ""
    return f" whose documents begin without the ids {list(begin_ids)} (--no-bos)" if begin_ids else " made with --bos"


def _bad_lines_message(state: State) -> str:
    total = state.num_bad + state.documents
    return (
        f"{state.num_bad:,} of {total:,} documents cannot be used, the first at {state.bad[0]}; correct them, or give "
        "--skip-bad to skip them (finished work is kept)"
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
