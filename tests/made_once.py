"""Results that several tests read, made once a session: by the first worker that asks, in a process of its own."""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.ranks import run_alone

MakeOnce = Callable[..., tuple[Path, Any]]
"""(function, *arguments) -> (directory, what function(*arguments, directory) returned)."""


def make_once(
    folder: Path, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0
) -> tuple[Path, Any]:
    """Return the directory and the result of a function that runs once a session.

    Args:
        folder: of all such results of a session.
        function: a module's function, which fills the directory that is its last argument. Its result is pickled.
        arguments: what it is asked for; equal arguments have equal representations.
        timeout_s: for it.
    """
    key = f"{function.__module__}.{function.__qualname__}{arguments!r}"
    directory = folder / f"{function.__name__.strip('_')}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    result = directory.with_suffix(".pickle")
    with FileLock(directory.with_suffix(".lock")):
        if not result.is_file():
            shutil.rmtree(directory, ignore_errors=True)  # of one that failed
            directory.mkdir()
            content = pickle.dumps(run_alone(function, *arguments, directory, timeout_s=timeout_s))
            result.with_suffix(".part").write_bytes(content)
            result.with_suffix(".part").rename(result)
    return directory, pickle.loads(result.read_bytes())


def folder_of_session(factory: pytest.TempPathFactory) -> Path:
    """A directory that all workers of a session share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"
    folder.mkdir(exist_ok=True)
    return folder
