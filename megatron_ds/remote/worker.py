"""The process that reads and writes a store: requests on stdin, answers on stdout, each a line of JSON.

It is started as `python -m megatron_ds.remote.worker`. Every action is tried several times if its failure may pass.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

WAITS_S = (0.5, 3.0, 15.0)
"""Seconds before each further try."""
WAITS_VARIABLE = "MEGATRON_DS_REMOTE_WAITS_S"
"""Environment variable with other ones, separated by blanks."""
THREADS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "updated")


def main() -> None:
    """Answer requests until stdin ends."""
    waits_s = [float(one) for one in os.environ.get(WAITS_VARIABLE, "").split()] or list(WAITS_S)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a client prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": _ACTIONS[request["action"]](_Files(request["url"], waits_s), request)}
        except Exception as problem:
            answer = {"error": _words(problem), "kind": _kind(problem)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Files:
    """The files of a store under a URL, each action with further tries."""

    def __init__(self, url: str, waits_s: list[float]) -> None:
        import fsspec

        self.system, root = fsspec.core.url_to_fs(url)
        self.system.invalidate_cache()
        self.root, self.waits_s = root.rstrip("/"), waits_s

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def tried(self, act: Callable[[], Any]) -> Any:
        """Return the result of an action; after a failure that may pass it is tried again."""
        for wait_s in self.waits_s:
            try:
                return act()
            except Exception as problem:
                if _kind(problem) != "away":
                    raise
                time.sleep(wait_s)
                self.system.invalidate_cache()
        return act()

    def each(self, names: list[str], act: Callable[[str], None]) -> None:
        """Do an action with every file, several at a time; after a failure no further one begins."""
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(self.tried, partial(act, name)) for name in names]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _list(files: _Files, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return name, size and version of every file under the URL; the file itself has an empty name."""

    def find() -> list[dict[str, Any]]:
        if "*" in files.root:
            found = files.system.glob(files.root, detail=True)
            base = os.path.commonpath([str(PurePosixPath(one).parent) for one in found]) if found else ""
        else:
            try:
                about = files.system.info(files.root)
            except FileNotFoundError as problem:
                if _kind(problem) == "missing":
                    return []
                raise
            if about["type"] == "file":
                return [_described("", about)]
            found, base = files.system.find(files.root, detail=True), files.root
        return [
            _described(path[len(base) :].lstrip("/"), about, path)
            for path, about in sorted(found.items())
            if about["type"] == "file"
        ]

    return files.tried(find)


def _described(name: str, about: dict[str, Any], path: str = "") -> dict[str, Any]:
    version = next((str(about[key]) for key in _VERSIONS if about.get(key) is not None), "")
    return {"name": name, "size": about.get("size"), "version": version, "path": path}


def _read(files: _Files, request: dict[str, Any]) -> str:
    return files.tried(lambda: files.system.cat_file(files.path(request["name"]))).decode()


def _download(files: _Files, request: dict[str, Any]) -> int:
    """Download files by name to local paths: to a temporary name first, and renamed when their size is right."""
    targets = {one["name"]: (Path(one["to"]), one.get("size"), one.get("path")) for one in request["files"]}

    def get(name: str) -> None:
        to, size, path = targets[name]
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f".{to.name}.part")
        files.system.get_file(path or files.path(name), str(part))
        if size is not None and part.stat().st_size != size:
            raise ConnectionError(f"{name} has {part.stat().st_size} of {size} bytes")
        os.replace(part, to)

    files.each(list(targets), get)
    return len(targets)


def _upload(files: _Files, request: dict[str, Any]) -> int:
    """Upload local files; those of `last` one by one, after all others are there."""
    sources = {one["name"]: one["from"] for one in request["files"]}

    def put(name: str) -> None:
        files.system.put_file(sources[name], files.path(name))

    last = request.get("last", [])
    files.each([name for name in sources if name not in last], put)
    for name in last:
        files.tried(partial(put, name))
    return sum(os.path.getsize(path) for path in sources.values())


def _write(files: _Files, request: dict[str, Any]) -> None:
    files.tried(lambda: files.system.pipe_file(files.path(request["name"]), request["text"].encode()))


def _remove(files: _Files, request: dict[str, Any]) -> None:
    """Remove files; those of `first` before all others."""
    first = request.get("first", [])
    for name in [*first, *(one for one in request["names"] if one not in first)]:
        files.tried(partial(files.system.rm_file, files.path(name)))


def _kind(problem: BaseException) -> str:
    """Return whether something is missing, denied, of the disk here, or away, which may pass; or "" for all else."""
    if isinstance(problem, OSError) and (problem.errno in _FULL or os.path.isabs(str(problem.filename or ""))):
        return "disk"
    if isinstance(problem, FileNotFoundError):  # fsspec's of web servers, whatever the cause is
        cause = problem.__cause__
        return "missing" if cause is None or getattr(cause, "status", None) in (404, 410) else _kind(cause)
    if isinstance(problem, PermissionError):
        return "denied"
    text = f"{type(problem).__module__}.{type(problem).__name__}"
    if any(word in text for word in ("NoCredentials", "CredentialsError", "Unauthorized")):
        return "denied"
    status = getattr(problem, "status", None)
    if status in (401, 403):
        return "denied"
    passing = (ConnectionError, TimeoutError, asyncio.TimeoutError, OSError)
    if isinstance(problem, passing) or status in (408, 429) or (isinstance(status, int) and status >= 500):
        return "away"
    libraries = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "huggingface_hub", "httpx")
    return "away" if type(problem).__module__.split(".")[0] in libraries else ""


def _words(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return text or type(problem).__name__


_ACTIONS = {
    "list": _list,
    "read": _read,
    "download": _download,
    "upload": _upload,
    "write": _write,
    "remove": _remove,
}

if __name__ == "__main__":
    main()
