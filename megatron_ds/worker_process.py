"""A process of this package that answers requests, both in lines of JSON, such as `remote.worker`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import weakref
from typing import Any


class WorkerProcess:
    """A process that runs a module; it ends with the object, and with this process.

    Args:
        module: dotted name of the module, which reads requests on stdin and writes answers on stdout.
        variables: environment variables of the process, besides those of this one.

    Attributes:
        is_dead: True if it has ended before an answer.
    """

    def __init__(self, module: str, **variables: str) -> None:
        self.is_dead = False
        paths = os.pathsep.join(one for one in sys.path if one)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, **variables},
            start_new_session=True,  # a Ctrl-C is for the run, which finishes its transfers
        )
        self._ending = weakref.finalize(self, _end, self._process, os.getpid())

    @property
    def has_answer(self) -> bool:
        """True if `receive` returns at once."""
        assert self._process.stdout is not None
        poll = select.poll()  # not `select`, which takes no descriptor above 1023
        poll.register(self._process.stdout, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, request: Any) -> None:
        """Send a request; if the process has died, `receive` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next line of an answer and return it; None if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            return dict(json.loads(line))
        self.is_dead = True
        return None

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit status."""
        return self._process.wait()


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """End a process that waits for requests; one that was forked from its owner leaves it alone."""
    if os.getpid() == owner and process.stdin is not None and process.stdout is not None:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
