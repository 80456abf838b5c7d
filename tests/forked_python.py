"""Run `python ARGUMENTS` in a fork of this process, which has imported torch, DeepSpeed and transformers already.

A cold `python -m megatron_ds` takes 5 to 20 s until it has imported what it needs. A fork needs none of them, and what
its user sees is the same: arguments, working directory, environment, both streams, signals, exit status. What imports
print, and what a launcher does to processes that it starts itself, only a cold start shows: `tests/cli` keeps one of
each launcher.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import transformers

from tests.ranks import preload

_POLL_S = 0.02
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


class ForkedPython:
    """A running command, with as much of `subprocess.Popen` as tests use.

    Attributes:
        pid: its process id; it leads a session of its own.
        returncode: as Popen's; None while it runs.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        cwd: Path,
        environ: Mapping[str, str],
        streams: tuple[int, int, int] | None = None,
        parents: tuple[int, ...] = (),
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Start it.

        Args:
            arguments: `-m MODULE ...` or `SCRIPT ...`.
            cwd: its working directory.
            environ: its environment. The accelerator is the one that this process has chosen.
            streams: file descriptors of its stdin, stdout and stderr; None = nothing to read, and files that
                `communicate` reads.
            parents: file descriptors that it must not hold, such as the other ends of pipes.
            prepare: called in it before the rest, such as to enter a namespace.
        """
        preload()
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("a+") for _ in range(2)]  # noqa: SIM115  (a full pipe needs a reader)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in parents:
                os.close(descriptor)
            with open(os.devnull) as nothing:
                own = (nothing.fileno(), *(file.fileno() for file in self._files))
                _become(list(map(str, arguments)), cwd, environ, streams or own, prepare)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit status, or minus the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout, *self._read())
            time.sleep(_POLL_S)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return stdout and stderr."""
        self.wait(timeout)
        out, err = self._read()
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> list[str]:
        for file in self._files:
            file.seek(0)
        return [file.read() for file in self._files]


def run_python(
    *arguments: object, timeout: float = 120.0, check: bool = False, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end, in this process's directory unless another is given.

    Its environment is this process's, with `environ` changed.

    Raises:
        subprocess.TimeoutExpired: it takes longer; it is killed.
        subprocess.CalledProcessError: where `check`, its status is not 0.
    """
    process = ForkedPython(arguments, cwd or Path.cwd(), {**os.environ, **environ})
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    done = subprocess.CompletedProcess(list(arguments), process.returncode or 0, out, err)
    if check and done.returncode:
        sys.stderr.write(err)  # pytest shows it
        done.check_returncode()
    return done


def can_fork(environ: Mapping[str, str]) -> bool:
    """Return whether a fork trains on the accelerator that an environment asks for: preloading has chosen one."""
    return environ.get("DS_ACCELERATOR") == os.environ.get("DS_ACCELERATOR")


def _become(
    arguments: Sequence[str],
    cwd: Path,
    environ: Mapping[str, str],
    streams: tuple[int, ...],
    prepare: Callable[[], None] | None,
) -> None:
    """Be the command and end as it does; never returns."""
    status = 1
    try:
        os.setsid()
        if prepare is not None:
            prepare()
        os.chdir(cwd)
        environ = dict(environ)  # it may be os.environ
        os.environ.clear()
        os.environ.update(environ)
        _forget_the_tests()
        _take(streams)
        status = _run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _forget_the_tests() -> None:
    """Undo what pytest has set: signal handlers, how warnings are shown, where log lines go."""
    faulthandler.disable()
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    importlib.reload(warnings)
    logging.getLogger().handlers.clear()
    transformers.utils.logging.disable_progress_bar()  # as `quiet_libraries` has it, which comes before the imports
    transformers.utils.logging.set_verbosity_error()


def _take(streams: tuple[int, ...]) -> None:
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(os.fdopen(0, "rb", closefd=False))
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False))
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        os.fdopen(2, "wb", closefd=False), errors="backslashreplace", line_buffering=True
    )


def _run(arguments: Sequence[str]) -> int:
    """Run the module or script; return the exit status that Python would give."""
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            sys.path.insert(0, os.getcwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as problem:
        if problem.code is None or isinstance(problem.code, int):
            return problem.code or 0
        print(problem.code, file=sys.stderr)
        return 1
    return 0
