"""What is written so far, and where it stands: a directory beside the output, which takes its place when it is whole.

```
.PREFIX.partial/
  tokens.bin       tokens of the chunks that are done
  lengths.bin      i32 each, of their documents
  journal.json     how many chunks, and how long both files were then; written last, by rename
```

Whatever a crash leaves behind the journal's word is cut off when the work goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
import xxhash

from megatron_ds.data.indexed.files import index_path, tokens_path, write_index
from megatron_ds.data.prepare.chunks import Chunk
from megatron_ds.data.prepare.workers import Encoded
from megatron_ds.errors import DataError

MOST_BAD = 1000
"""Places that are kept; more are only counted."""
_EVERY_S = 2.0
_READ_BYTES = 1 << 22


@dataclass
class State:
    """How far the work is.

    Attributes:
        key: stands for sources, tokenizer and options.
        chunks: done.
        tokens_bytes, documents, tokens, largest_id, longest: of their documents.
        bytes: read of the sources.
        file, lines: number of the last chunk's file, and its lines before the next one.
        num_bad, bad: what was no document: how many, and the first places with the reason.
    """

    key: str
    chunks: int = 0
    tokens_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    largest_id: int = -1
    longest: int = 0
    bytes: int = 0
    file: int = -1
    lines: int = 0
    num_bad: int = 0
    bad: list[str] = field(default_factory=list)


class Journal:
    """The unfinished output of one prefix. A context manager: on leaving, what is done is kept.

    Args:
        prefix: of the output.
        key: of the work; what was left of other work is thrown away.
        anew: throw away what was left in any case.

    Raises:
        DataError: another process writes to the same prefix, or nothing can be written there.
    """

    def __init__(self, prefix: str, key: str, anew: bool) -> None:
        self._prefix = prefix
        self._directory = _directory_of(prefix)
        self.began_anew = ""
        try:
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self._directory.with_name(f".{Path(prefix).name}.lock"))
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise DataError(f"--output={prefix} is being written by another process; wait for its end") from None
        except OSError as problem:
            raise self._full(problem) from problem
        found = self._read()
        if found is not None and (anew or found.key != key):
            self.began_anew = "as asked" if anew else "sources, tokenizer or options have changed"
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
        """Take the next chunk.

        Raises:
            DataError: the disk is full.
        """
        state = self.state
        try:  # first the files: what the state does not speak of is cut off
            self._tokens.write(encoded.tokens)
            self._lengths.write(encoded.lengths.astype("<i4").tobytes())
        except OSError as problem:
            raise self._full(problem) from problem
        if chunk.file != state.file:
            state.file, state.lines = chunk.file, 0
        for line, why in encoded.bad:
            if len(state.bad) < MOST_BAD:
                state.bad.append(_place(chunk, state.lines + line) + f": {why}")
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
        """Note how far it is."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        temporary = self._directory / "journal.json.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(self.state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._directory / "journal.json")
        self._saved_s = time.monotonic()

    def finish(self, dtype: np.dtype, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the index and the manifest, and give all three their names; the whole manifest.

        Raises:
            DataError: the disk is full.
        """
        try:
            self.save()
            lengths = np.fromfile(self._directory / "lengths.bin", dtype="<i4")
            write_index(self._directory / "index", dtype, lengths, np.arange(len(lengths) + 1))
            names = {"tokens.bin": tokens_path(self._prefix), "index": index_path(self._prefix)}
            sums = {final.suffix[1:]: _checksum(self._directory / name) for name, final in names.items()}
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
            if self._directory.is_dir():  # else it has its name already
                self.save()
        except OSError as problem:
            raise self._full(problem) from error
        finally:
            for file in (self._tokens, self._lengths):
                try:
                    file.close()
                except OSError:  # what could not be written is not in the journal either
                    continue
            self._lock.release()

    def _read(self) -> State | None:
        """What the journal says, if both files are at least as long as it says."""
        try:
            state = State(**json.loads((self._directory / "journal.json").read_text(encoding="utf-8")))
            sizes = [(self._directory / name).stat().st_size for name in ("tokens.bin", "lengths.bin")]
        except (OSError, ValueError, TypeError):
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
            "free there); make room, or choose another place; the same command goes on where it was"
        )


def complete(prefix: str) -> None:
    """Give whole files their names, the manifest last, where that was begun; else nothing."""
    directory = _directory_of(prefix)
    if not (directory / "manifest").is_file():
        return
    names = {"tokens.bin": tokens_path(prefix), "index": index_path(prefix), "manifest": Path(f"{prefix}.json")}
    left = {name: final for name, final in names.items() if (directory / name).is_file()}
    for final in reversed(left.values()):
        final.unlink(missing_ok=True)  # of earlier data: never beside files of these
    for name, final in left.items():
        os.replace(directory / name, final)
    shutil.rmtree(directory)


def _directory_of(prefix: str) -> Path:
    return Path(f"{prefix}.bin").with_name(f".{Path(prefix).name}.partial")


def _place(chunk: Chunk, line: int) -> str:
    """File and line, from 1; table and row, from 0."""
    return f"{chunk.path}: row {line}" if chunk.kind in (".parquet", "table") else f"{chunk.path}:{line + 1}"


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
