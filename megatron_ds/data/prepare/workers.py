"""Processes that tokenise chunks, a bounded number of them ahead of what has been written."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.prepare.chunks import Chunk, Reader
from megatron_ds.errors import DataError, LaunchError

AHEAD = 3  # chunks a worker that are read, tokenised or waiting to be written
_POLL_S = 0.5


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens.

    Attributes:
        column: the field that holds the text.
        end_id: follows each document; None = nothing does.
        dtype: of a token.
    """

    column: str
    end_id: int | None
    dtype: str


@dataclass(frozen=True)
class Encoded:
    """A chunk as tokens.

    Attributes:
        tokens: of its documents, one after the other, as bytes.
        lengths: (documents,) int32, in tokens.
        largest_id: of them; -1 where there are none.
        num_lines: that it has, or rows.
        bad: number of the line in the chunk, and what is wrong with it.
    """

    tokens: bytes
    lengths: np.ndarray
    largest_id: int
    num_lines: int
    bad: list[tuple[int, str]]


def encode_chunk(reader: Reader, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, chunk: Chunk) -> Encoded:
    """Read and tokenise one chunk; no special tokens but the end."""
    texts, bad, num_lines = [], [], 1
    for document in reader.documents(chunk):
        if document.text is not None:
            texts.append(document.text)
        elif document.problem:
            bad.append((document.line, document.problem))
        else:
            num_lines = document.line
    end = [] if encoding.end_id is None else [encoding.end_id]
    documents = [np.asarray([*ids, *end], dtype=np.int64) for ids in encode_texts(tokenizer, texts)]
    whole = np.concatenate([np.empty(0, dtype=np.int64), *documents])
    lengths = np.asarray([len(one) for one in documents], dtype=np.int32)
    return Encoded(whole.astype(encoding.dtype).tobytes(), lengths, int(whole.max(initial=-1)), num_lines, bad)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. The backend alone is asked where there is one: it makes neither offsets nor masks."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_all(
    chunks: Sequence[Chunk], tokenizer: PreTrainedTokenizerBase, encoding: Encoding, num_workers: int
) -> Generator[Encoded, None, None]:
    """Every chunk, in order, tokenised by as many processes. Close it, and they end.

    Args:
        chunks: what is read.
        tokenizer: forked workers have it from here; it has not been used yet, as its threads would not be there.
        encoding: how.
        num_workers: how many processes.

    Raises:
        DataError: a chunk cannot be read.
        LaunchError: a worker died, or failed for a reason that is ours.
    """
    context: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    tasks, results = context.Queue(), context.Queue()
    workers = [
        context.Process(target=_work, args=(encoding, tokenizer, tasks, results), name=f"prepare-{number}", daemon=True)
        for number in range(min(num_workers, len(chunks)))
    ]
    for worker in workers:
        worker.start()
    try:
        yield from _in_order(chunks, tasks, results, workers)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(5)
        for one in (tasks, results):
            one.cancel_join_thread()
            one.close()


def _in_order(chunks: Sequence[Chunk], tasks: Any, results: Any, workers: Sequence[Any]) -> Iterator[Encoded]:
    waiting: dict[int, Encoded] = {}
    given, room = 0, AHEAD * max(1, len(workers))
    for number in range(len(chunks)):
        while given < len(chunks) and given < number + room:
            tasks.put((given, chunks[given]))
            given += 1
        while number not in waiting:
            found, result = _next(results, workers)
            if isinstance(result, DataError):
                raise result
            if isinstance(result, str):
                raise LaunchError(f"a worker failed at {chunks[found].path}:\n{result}")
            waiting[found] = result
        yield waiting.pop(number)


def _next(results: Any, workers: Sequence[Any]) -> tuple[int, Any]:
    while True:
        try:
            return results.get(timeout=_POLL_S)
        except queue.Empty:
            dead = [worker for worker in workers if not worker.is_alive()]
            if dead:
                raise LaunchError(
                    f"{dead[0].name} ended with status {dead[0].exitcode} (negative: by that signal; -9 is often the "
                    "kernel's, for want of memory); start the command again, with fewer --workers: it goes on where it "
                    "was"
                ) from None


def _work(encoding: Encoding, tokenizer: PreTrainedTokenizerBase, tasks: Any, results: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reader = Reader(encoding.column)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    while True:
        number, chunk = tasks.get()
        try:
            results.put((number, encode_chunk(reader, tokenizer, encoding, chunk)))
        except DataError as problem:
            results.put((number, problem))
        except OSError as problem:
            results.put((number, DataError(f"data: {chunk.path}: cannot be read ({problem})")))
        except Exception:  # the parent must not wait for it
            results.put((number, traceback.format_exc()))
