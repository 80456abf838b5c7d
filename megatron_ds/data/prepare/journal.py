"""The unfinished output and its journal: a directory next to the output, which replaces it when it is complete.

```
.PREFIX.partial/
  tokens.bin       tokens of the finished chunks
  lengths.bin      i32 each, of their documents
  journal.json     number of chunks, and size of both files at that time; written last, by rename
```

Bytes that a crash leaves beyond the sizes in the journal are truncated when the work is resumed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from megatron_ds.atomic import replacing
from megatron_ds.data.indexed.files import index_path, tokens_path, write_index
from megatron_ds.data.prepare.chunks import Chunk
from megatron_ds.data.prepare.workers import Encoded
from megatron_ds.digests import file_xxh3
from megatron_ds.errors import DataError
from megatron_ds.locks import FileLock, LockHeldError
from megatron_ds.untrusted import read_record
from megatron_ds.untrusted.limits import DATA_RECORD

MOST_BAD = 1000
"""Number of bad lines whose places are kept; more are only counted."""
_EVERY_S = 2.0
_Count = Annotated[int, Field(ge=0)]


@dataclass
class State:
    """Progress of the work; the attributes are the keys of `journal.json`.

    Attributes:
        key: hash of sources, tokenizer and options.
        chunks: number of finished chunks.
        tokens_bytes, documents, tokens, largest_id, longest: of their documents.
        bytes: read from the sources.
        file, lines: index of the last chunk's file, and number of its lines so far.
        num_bad, bad: number of lines without a document, and the first of their places, with the reason.
    """

    key: str
    chunks: _Count = 0
    tokens_bytes: _Count = 0
    documents: _Count = 0
    tokens: _Count = 0
    largest_id: int = -1
    longest: _Count = 0
    bytes: _Count = 0
    file: int = -1
    lines: _Count = 0
    num_bad: _Count = 0
    bad: list[str] = field(default_factory=list)


class Journal:
    """The unfinished output of one prefix. A context manager: on leaving, finished work is saved.

    Args:
        prefix: of the output.
        key: of the work; unfinished output of other work is discarded.
        restart: discard unfinished output in any case.

    Attributes:
        discarded: the reason why unfinished output was discarded; empty if there was none, or if it is continued.

    Raises:
        DataError: another process writes to the same prefix, or the directory cannot be written.
    """

    def __init__(self, prefix: str, key: str, restart: bool) -> None:
        self._prefix = prefix
        self._directory = _directory_of(prefix)
        self.discarded = ""
        try:
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._directory.with_name(f".{Path(prefix).name}.lock"))
            self._lock.acquire(blocking=False)
        except LockHeldError as problem:
            who = f" ({problem.owner})" if problem.owner else ""
            raise DataError(f"--output={prefix} is being written by another process{who}; wait until it ends") from None
        except OSError as problem:
            raise self._full(problem) from problem
        found = self._read()
        if found is not None and (restart or found.key != key):
            self.discarded = "as requested" if restart else "sources, tokenizer or options have changed"
            found = None
        self.state = found or State(key)
        if found is None:
            shutil.rmtree(self._directory, ignore_errors=True)
        try:
            self._directory.mkdir(exist_ok=True)
            self._tokens = self._opened("tokens.bin", self.state.tokens_bytes)
            self._lengths = self._opened("lengths.bin", 4 * self.state.documents)
        except OSError as problem:
            raise self._full(problem) from problem
        self._saved_s = time.monotonic()

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Append the next chunk.

        Raises:
            DataError: the disk is full.
        """
        state = self.state
        try:  # first the files: bytes beyond the sizes in the state are truncated
            self._tokens.write(encoded.tokens)
            self._lengths.write(encoded.lengths.astype("<i4").tobytes())
        except OSError as problem:
            raise self._full(problem) from problem
        if chunk.file != state.file:
            state.file, state.lines = chunk.file, 0
        for line, why in encoded.bad:
            if len(state.bad) < MOST_BAD:
                place = line if isinstance(line, str) else _place(chunk, state.lines + line)
                state.bad.append(f"{place}: {why}")
        state.num_bad += len(encoded.bad)
        state.lines += encoded.num_lines
        state.chunks += 1
        state.bytes += chunk.bytes
        state.documents += len(encoded.lengths)
        state.tokens += int(encoded.lengths.sum())
        state.tokens_bytes += len(encoded.tokens)
        state.largest_id = max(state.largest_id, encoded.largest_id)
        state.longest = max(state.longest, int(encoded.lengths.max(initial=0)))
        if time.monotonic() - self._saved_s > _EVERY_S:
            try:
                self.save()
            except OSError as problem:
                raise self._full(problem) from problem

    def save(self) -> None:
        """Write the journal."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        with replacing(self._directory / "journal.json", durable=True) as temporary:
            temporary.write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        self._saved_s = time.monotonic()

    def finish(self, dtype: np.dtype, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the index and the manifest, and give all three files their names; return the full manifest.

        Raises:
            DataError: the disk is full.
        """
        try:
            self.save()
            lengths = np.fromfile(self._directory / "lengths.bin", dtype="<i4")
            write_index(self._directory / "index", dtype, lengths, np.arange(len(lengths) + 1))
            names = {"tokens.bin": tokens_path(self._prefix), "index": index_path(self._prefix)}
            sums = {final.suffix[1:]: file_xxh3(self._directory / name) for name, final in names.items()}
            manifest = {**manifest, "xxh3_128": sums}
            text = json.dumps(manifest, indent=2) + "\n"
            (self._directory / "manifest.tmp").write_text(text, encoding="utf-8")
            for name in (*names, "manifest.tmp"):
                with (self._directory / name).open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(self._directory / "manifest.tmp", self._directory / "manifest")
            complete(self._prefix)
        except OSError as problem:
            raise self._full(problem) from problem
        return manifest

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._directory.is_dir():  # else the output is finished
                self.save()
        except OSError as problem:
            raise self._full(problem) from error
        finally:
            for file in (self._tokens, self._lengths):
                try:
                    file.close()
                except OSError:  # bytes that could not be written are not in the journal either
                    continue
            self._lock.release()

    def _read(self) -> State | None:
        """Return the state in the journal, if both files have at least the sizes in it."""
        try:
            state = read_record(self._directory / "journal.json", State, DATA_RECORD, DataError)
            sizes = [(self._directory / name).stat().st_size for name in ("tokens.bin", "lengths.bin")]
        except (OSError, DataError):
            return None
        return state if sizes[0] >= state.tokens_bytes and sizes[1] >= 4 * state.documents else None

    def _opened(self, name: str, size: int) -> Any:
        file = (self._directory / name).open("ab")
        file.truncate(size)
        return file

    def _full(self, problem: OSError) -> DataError:
        place = next(one for one in (self._directory, *self._directory.absolute().parents) if one.is_dir())
        free = shutil.disk_usage(place).free
        return DataError(
            f"--output={self._prefix} could not be written: {problem.strerror or problem} ({free / 1e9:.2f} GB are "
            "free there); free some space, or choose another place; the same command continues where it stopped"
        )


def complete(prefix: str) -> None:
    """Give finished files their names, the manifest last; does nothing for unfinished output."""
    directory = _directory_of(prefix)
    if not (directory / "manifest").is_file():
        return
    names = {"tokens.bin": tokens_path(prefix), "index": index_path(prefix), "manifest": Path(f"{prefix}.json")}
    left = {name: final for name, final in names.items() if (directory / name).is_file()}
    for final in reversed(left.values()):
        final.unlink(missing_ok=True)  # of earlier data: old and new files must not mix
    for name, final in left.items():
        os.replace(directory / name, final)
    shutil.rmtree(directory)


def _directory_of(prefix: str) -> Path:
    return Path(f"{prefix}.bin").with_name(f".{Path(prefix).name}.partial")


def _place(chunk: Chunk, line: int) -> str:
    """Return file and line, from 1, or table and row, from 0."""
    return f"{chunk.path}: row {line}" if chunk.kind in (".parquet", "table") else f"{chunk.path}:{line + 1}"
