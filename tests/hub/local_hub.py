"""A local hub for tests: repositories are published into it, clients of this process use it, requests are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub import server
from tests.hub.server import LOG, Repo


@dataclass(frozen=True)
class Request:
    """One request that the hub got.

    Attributes:
        method, path: of the request.
        range: its range of bytes, such as "bytes=0-99"; None = all.
    """

    method: str
    path: str
    range: str | None

    @property
    def name(self) -> str:
        """Name of the file that is asked for."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class LocalHub:
    """The address and the folder of a running hub, and the cache of its clients."""

    address: str
    root: Path
    cache: Path
    process: subprocess.Popen[str]

    def publish(self, source: Path | Mapping[str, bytes], name: str, kind: str = "models", **settings: bool) -> str:
        """Commit the files of a directory to a repository, which is made if need be; returns the commit."""
        folder = self.root / kind / name
        repo = Repo.read(folder) if (folder / "repo.json").is_file() else Repo(folder)
        repo.private, repo.gated = settings.get("private", False), settings.get("gated", False)
        files: dict[str, bytes | Path]
        if isinstance(source, Path):
            files = {one.relative_to(source).as_posix(): one for one in sorted(source.rglob("*")) if one.is_file()}
        else:
            files = dict(source)
        return repo.commit(files, set())

    def repo(self, name: str, kind: str = "models") -> Repo:
        return Repo.read(self.root / kind / name)

    def files(self, name: str, kind: str = "models") -> dict[str, Path]:
        """The files of a repository's main branch."""
        repo = self.repo(name, kind)
        return repo.files(repo.branches["main"])

    @property
    def requests(self) -> list[Request]:
        """All requests so far, of all processes."""
        log = self.root / LOG
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        return [Request(one["method"], one["path"], one["range"]) for one in map(json.loads, lines)]

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for in full; redirects are followed once."""
        return [
            one.name
            for one in self.requests
            if one.method == "GET" and one.range is None and ("/cdn/" in one.path or self._is_small(one))
        ]

    @staticmethod
    def _is_small(one: Request) -> bool:
        return "/resolve/" in one.path and not one.name.endswith(server.LARGE)

    def forget_requests(self) -> None:
        (self.root / LOG).unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server: from now on there is no net."""
        self.process.terminate()
        self.process.wait()


@contextmanager
def running_hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Start a hub, and have this process and its children use it, with an empty cache and no token.

    The clients have read their variables when they were imported, so what they made of them is replaced too.
    """
    root, cache = folder / "hub", folder / "hf_home" / "hub"
    root.mkdir()
    process = subprocess.Popen([sys.executable, server.__file__, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    use_hub(address, cache.parent, patch)
    try:
        yield LocalHub(address, root, cache, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def use_hub(address: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    import datasets.config
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    environ = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environ["XDG_CACHE_HOME"] = str(home.parent / "cache")
    for name, value in environ.items():
        patch.setenv(name, value)
    for name in [one for one in os.environ if one.startswith("HF_TOKEN")]:
        patch.delenv(name)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HOME", str(home))
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    patch.setattr(datasets.config, "HF_ENDPOINT", address)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    close_session()


def go_offline(patch: pytest.MonkeyPatch) -> None:
    """Set HF_HUB_OFFLINE as a user does, for this process and its children."""
    import datasets.config
    from huggingface_hub import constants

    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
