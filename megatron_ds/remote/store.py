"""The files under a URL, read and written by `worker`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.errors import RemoteError
from megatron_ds.untrusted.names import is_inside_name
from megatron_ds.worker_process import WorkerProcess


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store.

    Attributes:
        name: relative to the URL of the store; empty if that is the file.
        size: in bytes; None = the server does not say.
        version: a text that changes with its content, such as its ETag; empty = unknown.
        path: where a pattern found it; empty = under the URL of the store, by its name.
    """

    name: str
    size: int | None
    version: str
    path: str = ""


class Store:
    """The files under a URL. A method returns when the work is done, or when it has failed several times.

    Args:
        url: of a directory, a file, or for `list` a pattern.
        named: the beginning of errors, such as "model.path=s3://bucket/model".
    """

    def __init__(self, url: str, named: str) -> None:
        self.url, self.named = url.rstrip("/"), named
        self._worker: WorkerProcess | None = None

    def list(self) -> list[RemoteFile]:
        """Return all files, in the order of their names; empty if the URL has no file.

        Raises:
            RemoteError: the store cannot be read, or has a name that would lead out of a directory here.
        """
        found = [RemoteFile(**one) for one in self._ask("list")]
        for one in found:
            if one.name and not is_inside_name(one.name):
                raise RemoteError(f"{self.named} has a file named {one.name!r:.200}, which leads out of a directory")
        return found

    def read_text(self, name: str) -> str | None:
        """Return the text of a small file; None = there is no such file."""
        answer = self._start("read", {"name": name}).answer()
        return None if answer.get("kind") == "missing" else self._result(answer)

    def download(self, files: Mapping[str, Path], found: Sequence[RemoteFile] = ()) -> None:
        """Download files by name to paths; a path holds a complete file or none.

        Args:
            files: name -> local path.
            found: what `list` has returned of them, to compare sizes.

        Raises:
            RemoteError: a file cannot be read.
        """
        about = {one.name: one for one in found}
        self._ask("download", {"files": [_wanted(name, to, about.get(name)) for name, to in files.items()]})

    def begin_upload(self, files: Mapping[str, Path], last: Sequence[str] = ()) -> Transfer:
        """Begin to upload local files under names; those of `last` follow when all others are there."""
        sources = [{"name": name, "from": str(path)} for name, path in files.items()]
        return self._start("upload", {"files": sources, "last": list(last)})

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        self._ask("write", {"name": name, "text": text})

    def remove(self, names: Sequence[str], first: Sequence[str] = ()) -> None:
        """Remove files, those of `first` before all others."""
        if names:
            self._ask("remove", {"names": list(names), "first": list(first)})

    def _ask(self, action: str, more: Mapping[str, Any] | None = None) -> Any:
        return self._result(self._start(action, more or {}).answer())

    def _start(self, action: str, more: Mapping[str, Any]) -> Transfer:
        """Send a request to this store's process, which serves one at a time."""
        if self._worker is None or self._worker.is_dead:
            self._worker = WorkerProcess("megatron_ds.remote.worker", TOKENIZERS_PARALLELISM="false")
        self._worker.send({"action": action, "url": self.url, **more})
        return Transfer(self, self._worker)

    def _result(self, answer: Mapping[str, Any]) -> Any:
        if "error" not in answer:
            return answer["result"]
        raise RemoteError(f"{self.named} {_reason(answer)}")


class Transfer:
    """A request that a store's process is answering. Until it has, the store takes no other."""

    def __init__(self, store: Store, worker: WorkerProcess) -> None:
        self._store, self._worker = store, worker

    @property
    def is_done(self) -> bool:
        """True if the answer is here, or the process has died."""
        return self._worker.has_answer

    def answer(self) -> dict[str, Any]:
        """Wait for the answer and return it."""
        answer = self._worker.receive()
        if answer is None:
            return {"error": f"its process ended with status {self._worker.wait()}", "kind": ""}
        return answer

    def result(self) -> Any:
        """Wait for the answer and return the result.

        Raises:
            RemoteError: it has failed.
        """
        return self._store._result(self.answer())


def _wanted(name: str, to: Path, about: RemoteFile | None) -> dict[str, Any]:
    known = {"size": about.size, "path": about.path} if about is not None else {}
    return {"name": name, "to": str(to), **known}


def _reason(answer: Mapping[str, Any]) -> str:
    kind, words = answer["kind"], str(answer["error"])[:300]
    if kind == "missing":
        return "does not exist; check the name, and list it with `fsspec` or the tool of your store"
    if kind == "disk":
        return f"has failed on this machine's disk ({words})"
    if kind == "denied":
        return f"cannot be used with your credentials ({words}); check them and the permissions of the bucket"
    if kind == "away":
        return f"cannot be reached, also after more tries ({words}); check the net, and try again later"
    return f"has failed ({words})"
