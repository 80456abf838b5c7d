"""The process that copies files of checkpoints: requests on stdin, answers on stdout, each a line of JSON.

It is started as `python -m megatron_ds.checkpoint.copy_worker`. It takes neither the interpreter nor a core from the
training, and ends with its parent: what it leaves is a directory with a temporary name, which nothing reads.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

import xxhash

_READ_BYTES = 2**22
_NICE = 10  # below the training


class FileCopy(NamedTuple):
    """A file to be copied.

    Attributes:
        source, target: paths; the directory of the target is made.
        bytes, xxh3_128: the length and the checksum that it must have.
        former: a file elsewhere with the same content, which is linked instead if it can be and is intact; empty = it
            is copied.
    """

    source: str
    target: str
    bytes: int
    xxh3_128: str
    former: str = ""


def copy_file(copy: FileCopy) -> None:
    """Copy a file through to the disk, and compare what is read with its checksum.

    Raises:
        OSError: it cannot be read or written, or is damaged.
    """
    target = Path(copy.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if copy.former:
        try:
            os.link(copy.former, target)
            if _is_intact(target, copy):
                return
        except OSError:  # another disk, or no links there
            pass
        target.unlink(missing_ok=True)
    digest, num_bytes = xxhash.xxh3_128(), 0
    with open(copy.source, "rb", buffering=0) as source, open(target, "xb", buffering=0) as file:
        while chunk := source.read(_READ_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    if (num_bytes, digest.hexdigest()) != (copy.bytes, copy.xxh3_128):
        raise OSError(f"{copy.source} does not match its checksum")


def _is_intact(file: Path, copy: FileCopy) -> bool:
    digest, num_bytes = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as content:
        while chunk := content.read(_READ_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return (num_bytes, digest.hexdigest()) == (copy.bytes, copy.xxh3_128)


def main() -> None:
    """Answer requests until stdin ends: after each file `{"bytes": n}`, then `{"done": true}`, or `{"error": text}`."""
    os.nice(_NICE)
    answers, sys.stdout = sys.stdout, sys.stderr
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        answer: dict[str, object] = {"done": True}
        try:
            for copy in (FileCopy(*one) for one in json.loads(requests.get())):
                copy_file(copy)
                _answer(answers, {"bytes": copy.bytes})
        except OSError as problem:
            answer = {"error": problem.strerror or str(problem)}
        _answer(answers, answer)


def _answer(answers: TextIO, answer: Mapping[str, object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _read(requests: queue.Queue[str]) -> None:
    """Queue the requests, and end the process with its parent, in the middle of a file too."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
