"""Worker processes that tokenize chunks, a bounded number of chunks ahead of the writer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.prepare.chunks import Chunk, Reader
from megatron_ds.data.readers.long_text import encode_long, is_long
from megatron_ds.errors import DataError, LaunchError

AHEAD = 3  # chunks per worker that are read, tokenized or waiting to be written
_TOKEN = "<u4"  # until all ids of a chunk are known
_GIVEN = 2  # chunks that a worker holds: the one that it tokenizes, and the next


@dataclass(frozen=True)
class Encoding:
    """Settings of the conversion of documents to tokens.

    Attributes:
        column: the field that holds the text.
        end_id: the id after each document; None = no id.
        dtype: of a token.
        begin_ids: the ids before each document.
    """

    column: str
    end_id: int | None
    dtype: str
    begin_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk.

    Attributes:
        tokens: of its documents, one after the other, as bytes.
        lengths: (documents,) int32, in tokens.
        largest_id: of the tokens; -1 if there are no tokens.
        num_lines: number of lines, or rows.
        bad: (line in the chunk, or place in the file; reason) for each line without a document.
    """

    tokens: bytes
    lengths: np.ndarray
    largest_id: int
    num_lines: int
    bad: list[tuple[int | str, str]]


Report = Callable[[float], None]
"""Called with the part of a chunk that is done."""


def encode_chunk(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, chunk: Chunk, report: Report
) -> Encoded:
    """Read and tokenize one chunk, without special tokens except those around it.

    Documents of a megabyte and more are tokenized by themselves, in pieces: an encoding takes 500 bytes per token.
    """
    num_lines = 1
    texts: list[str] = []
    ids: list[np.ndarray] = []
    bad: list[tuple[int | str, str]] = []
    for document in reader.documents(chunk):
        if document.text is not None and is_long(document.text):
            ids += [*_arrays(tokenizer, texts), _encode_one(tokenizer, document.text, report)]
            texts = []
        elif document.text is not None:
            texts.append(document.text)
        elif document.problem:
            bad.append((document.line, document.problem))
        elif isinstance(document.line, int):
            num_lines = document.line
    ids += _arrays(tokenizer, texts)
    frame = len(encoding.begin_ids) + (encoding.end_id is not None)
    lengths = np.asarray([len(one) + frame for one in ids], dtype=np.int32)
    end = [] if encoding.end_id is None else [encoding.end_id]
    parts = (part for one in ids for part in (encoding.begin_ids, one, end))
    tokens = np.concatenate([np.empty(0, dtype=_TOKEN), *(np.asarray(part, dtype=_TOKEN) for part in parts)])
    return Encoded(
        tokens.astype(encoding.dtype).tobytes(), lengths, int(tokens.max()) if len(tokens) else -1, num_lines, bad
    )


def _arrays(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.asarray(one, dtype=_TOKEN) for one in encode_texts(tokenizer, texts)]


def _encode_one(tokenizer: PreTrainedTokenizerBase, text: str, report: Report) -> np.ndarray:
    """Return the ids of a long document, (T,) uint32, and report its progress."""
    pieces = []
    for piece, done in encode_long(tokenizer, text):
        pieces.append(piece.astype(_TOKEN))
        report(done)
    return np.concatenate(pieces)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text. Uses the backend directly if there is one, without offsets and masks."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_all(
    chunks: Sequence[Chunk],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    num_workers: int,
    report: Report = lambda done: None,
) -> Generator[Encoded, None, None]:
    """Yield every chunk, in order, tokenized by worker processes. Closing the generator ends them.

    Args:
        chunks: to read.
        tokenizer: inherited by forked workers; must not have been used before, as its threads do not survive a fork.
        encoding: settings.
        num_workers: number of processes.
        report: called with the part of the chunk that is to be yielded next, while that is a long document.

    Raises:
        DataError: a chunk cannot be read.
        LaunchError: a worker died, or failed by a defect of ours.
    """
    workers: list[_Worker] = []
    try:
        for number in range(min(num_workers, len(chunks))):
            workers.append(_start(number, encoding, tokenizer, workers))
        yield from _in_order(chunks, workers, report)
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.pipe.close()
        for worker in workers:
            worker.process.join(5)


@dataclass
class _Worker:
    """A process, and a pipe between it and its parent alone: when one ends, the other reads the end of the pipe.

    A queue shared by all has a lock: a process that is killed while holding it leaves the others waiting forever.
    """

    process: Any
    pipe: Connection
    num_given: int = 0


def _start(number: int, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, others: Sequence[_Worker]) -> _Worker:
    forks = "fork" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    ours, theirs = context.Pipe()
    inherited = [ours, *(other.pipe for other in others)] if forks else []
    process = context.Process(
        target=_work, args=(encoding, tokenizer, theirs, inherited), name=f"prepare-{number}", daemon=True
    )
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _in_order(chunks: Sequence[Chunk], workers: Sequence[_Worker], report: Report) -> Iterator[Encoded]:
    waiting: dict[int, Encoded] = {}
    given, room = 0, AHEAD * max(1, len(workers))
    for number in range(len(chunks)):
        while number not in waiting:
            for worker in [*workers, *workers]:  # one chunk each, then a second
                if worker.num_given < _GIVEN and given < min(len(chunks), number + room):
                    _give(worker, given, chunks[given])
                    given += 1
            for worker in _ready(workers):
                found, result = _receive(worker)
                if isinstance(result, float):
                    if found == number:
                        report(result)
                    continue
                if isinstance(result, DataError):
                    raise result
                if isinstance(result, str):
                    raise LaunchError(f"a worker failed at {chunks[found].path}:\n{result}")
                waiting[found] = result
        yield waiting.pop(number)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    pipes = wait([worker.pipe for worker in workers])
    return [worker for worker in workers if worker.pipe in pipes]


def _give(worker: _Worker, number: int, chunk: Chunk) -> None:
    try:
        worker.pipe.send((number, chunk))
    except OSError:
        raise _ended(worker) from None
    worker.num_given += 1


def _receive(worker: _Worker) -> tuple[int, Any]:
    try:
        result = worker.pipe.recv()
    except (EOFError, OSError):  # possibly in the middle of a message
        raise _ended(worker) from None
    if not isinstance(result[1], float):
        worker.num_given -= 1
    return result


def _ended(worker: _Worker) -> LaunchError:
    worker.process.join(5)
    return LaunchError(
        f"{worker.process.name} ended with status {worker.process.exitcode} (negative: killed by that signal; -9 is "
        "often the kernel, out of memory); run the command again with fewer --workers: it continues where it stopped"
    )


def _work(
    encoding: Encoding, tokenizer: PreTrainedTokenizerBase, pipe: Connection, inherited: Sequence[Connection]
) -> None:
    for other in inherited:  # copies in a fork would keep the pipes open after the parent has ended
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reader = Reader(encoding.column)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended
        while True:
            number, chunk = pipe.recv()
            report = partial(_send_progress, pipe, number)
            pipe.send((number, _result(reader, tokenizer, encoding, chunk, report)))


def _send_progress(pipe: Connection, number: int, done: float) -> None:
    pipe.send((number, done))


def _result(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, chunk: Chunk, report: Report
) -> Encoded | DataError | str:
    try:
        return encode_chunk(reader, tokenizer, encoding, chunk, report)
    except DataError as problem:
        return problem
    except OSError as problem:
        return DataError(f"data: {chunk.path}: cannot be read ({problem})")
    except Exception:  # reported, so that the parent does not wait for a result
        return traceback.format_exc()
