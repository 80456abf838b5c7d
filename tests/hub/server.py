"""A stand-in of the Hugging Face hub on one machine: the HTTP calls that huggingface_hub makes, on files in a folder.

`python server.py FOLDER` serves `FOLDER/models/ORG/NAME` and `FOLDER/datasets/ORG/NAME`. Each repository has a
folder `commits/SHA` for each commit, and `repo.json`: the branches, and faults to play. `local_hub.py` starts it.

Calls: information, listings of files, HEAD and GET with ranges and ETags (large files through a redirect, as from a
content delivery network), creation, and commits with large files uploaded first (git LFS, in one part). There is no
Xet storage: the client takes plain HTTP where the server offers nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_a_member"
STRANGER = "hf_of_a_stranger"
LARGE = (".safetensors", ".bin", ".parquet", ".gz", ".model")  # kept by git LFS, as .gitattributes has it on the hub
LOG = "requests.jsonl"
_REVISION = r"(?P<revision>[^/]+)"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """A repository's branches and commits.

    Attributes:
        folder: of the repository.
        branches: name -> commit.
        private: only `TOKEN` sees it.
        gated: everyone sees it, and only `TOKEN` may read its files.
        failing: end of a file's name -> how many requests for it are still answered by 503.
        cut: end of a file's name -> how many answers still break off in the middle.
    """

    folder: Path
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    failing: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Repo:
        return cls(folder, **json.loads((folder / "repo.json").read_text()))

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = {name: value for name, value in vars(self).items() if name != "folder"}
        (self.folder / "repo.json").write_text(json.dumps(plain))

    def commit_of(self, revision: str) -> str | None:
        known = [path.name for path in (self.folder / "commits").glob("*")]
        return self.branches.get(revision) or (revision if revision in known else None)

    def files(self, commit: str) -> dict[str, Path]:
        root = self.folder / "commits" / commit
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def commit(self, new: dict[str, bytes | Path], deleted: set[str], branch: str = "main") -> str:
        """Add a commit to a branch; returns its name."""
        before = self.branches.get(branch)
        kept = {name: path for name, path in (self.files(before) if before else {}).items() if name not in deleted}
        content = {**kept, **new}
        seed = repr((before, sorted(content), [_sha256(one) for one in content.values()]))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        root = self.folder / "commits" / commit
        root.mkdir(parents=True, exist_ok=True)
        for name, one in content.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(one, bytes):
                (root / name).write_bytes(one)
            else:
                shutil.copyfile(one, root / name)
        self.branches[branch] = commit
        self.write()
        return commit

    def play(self, kind: str, name: str) -> bool:
        """Return whether a fault is to be played for a file, and count it."""
        faults: dict[str, int] = getattr(self, kind)
        end = next((one for one, left in faults.items() if name.endswith(one) and left > 0), None)
        if end is not None:
            faults[end] -= 1
            self.write()
        return end is not None


def _bytes(one: bytes | Path) -> bytes:
    return one if isinstance(one, bytes) else one.read_bytes()


def _sha256(one: bytes | Path) -> str:
    return hashlib.sha256(_bytes(one)).hexdigest()


def _blob_id(one: bytes | Path) -> str:
    data = _bytes(one)
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith(LARGE)


def _entry(name: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": _blob_id(path)}
    if _is_large(name):
        found["lfs"] = {"oid": _sha256(path), "size": found["size"], "pointerSize": 134}
    return found


class Hub(ThreadingHTTPServer):
    """The server; `root` holds the repositories, uploaded large files, and a line of JSON for each request."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Call)
        self.root, self.guard = root, threading.RLock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def address_of_large(self) -> str:
        """Another host's, to which clients send no token."""
        return f"http://localhost:{self.server_address[1]}"


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Call(BaseHTTPRequestHandler):
    """One request. The table at the end has the routes."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        """Find the route of this request and run it."""
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.guard:
            with open(self.server.root / LOG, "a", encoding="utf-8") as log:
                agent = self.headers.get("User-Agent", "")
                line = {"method": self.command, "path": parts.path, "range": self.headers.get("Range"), "agent": agent}
                log.write(json.dumps(line) + "\n")
            try:
                for methods, pattern, call in ROUTES:
                    match = re.fullmatch(pattern, parts.path)
                    if match and self.command in methods:
                        call(self, **{name: unquote(text) for name, text in match.groupdict().items() if text})
                        return
                raise _Refused(404, "", f"no such call: {self.command} {parts.path}")
            except _Refused as problem:
                self.reply(problem.status, {"error": str(problem)}, {"X-Error-Code": problem.code})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr empty."""

    def reply(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        if "X-Error-Code" in (headers or {}):
            self.send_header("X-Error-Message", str(content["error"]))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def repo(self, kind: str, repo: str, *, for_files: bool = False, for_writing: bool = False) -> Repo:
        """Return a repository that the caller may see, as the hub decides it."""
        folder = self.server.root / kind / repo
        found = Repo.read(folder) if (folder / "repo.json").is_file() else None
        if self.token not in (None, TOKEN, STRANGER):
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        if found is None or (found.private and self.token != TOKEN):
            status = 401 if self.token is None else 404  # who is not known does not learn whether it exists
            raise _Refused(
                status, "RepoNotFound", "Repository not found" if self.token else "Invalid username or password."
            )
        if found.gated and for_files and self.token != TOKEN:
            status = 401 if self.token is None else 403
            raise _Refused(status, "GatedRepo", f"Access to model {repo} is restricted.")
        if for_writing and self.token != TOKEN:
            raise _Refused(401 if self.token is None else 403, "", "You don't have the rights to write here.")
        return found

    @staticmethod
    def commit(repo: Repo, revision: str) -> str:
        found = repo.commit_of(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # ---- reading -----------------------------------------------------------------------------------------------------

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        found = self.repo(kind, repo)
        commit = self.commit(found, revision)
        siblings = [{"rfilename": name} for name in found.files(commit)]
        gated = "auto" if found.gated else False
        base = {"_id": "0", "id": repo, "sha": commit, "private": found.private, "gated": gated, "disabled": False}
        self.reply(200, {**base, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, kind: str, repo: str, revision: str, place: str = "") -> None:
        found = self.repo(kind, repo, for_files=True)
        files = found.files(self.commit(found, revision))
        under = f"{place}/" if place else ""
        inside = {name: path for name, path in files.items() if name.startswith(under)}
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        shown = [_entry(name, path) for name, path in inside.items() if deep or "/" not in name[len(under) :]]
        folders = sorted({under + name[len(under) :].split("/")[0] for name in inside if "/" in name[len(under) :]})
        self.reply(200, [{"type": "directory", "path": one, "size": 0, "oid": "0" * 40} for one in folders] + shown)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        found = self.repo(kind, repo, for_files=True)
        files = found.files(self.commit(found, revision))
        wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        shown = [_entry(name, files[name]) for name in wanted if name in files]
        folders = [one for one in wanted if any(name.startswith(f"{one}/") for name in files)]
        self.reply(200, shown + [{"type": "directory", "path": one, "size": 0, "oid": "0" * 40} for one in folders])

    def resolve(self, repo: str, revision: str, name: str, kind: str = "models") -> None:
        found = self.repo(kind.rstrip("/"), repo, for_files=True)
        commit = self.commit(found, revision)
        path = found.files(commit).get(name)
        if path is None:
            self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        if self.command == "GET" and found.play("failing", name):
            raise _Refused(503, "", "Service Unavailable")
        common = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not _is_large(name):
            self.send_file(path, {**common, "ETag": f'"{_blob_id(path)}"'}, found, name)
            return
        size, digest = path.stat().st_size, _sha256(path)
        common |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{digest}"'}
        place = f"/cdn/{kind.rstrip('/')}/{repo}/{commit}/{name}"
        self.reply(302, None, {**common, "Location": self.server.address_of_large + place})

    def content(self, kind: str, repo: str, revision: str, name: str) -> None:
        found = Repo.read(self.server.root / kind / repo)
        path = found.files(revision)[name]
        self.send_file(path, {"ETag": f'"{_sha256(path)}"', "Accept-Ranges": "bytes"}, found, name)

    def send_file(self, path: Path, headers: dict[str, str], repo: Repo, name: str) -> None:
        data, status = path.read_bytes(), 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span:
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            if first >= len(data):
                self.reply(416, None, {"Content-Range": f"bytes */{len(data)}"})
                return
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for key, value in {**headers, "Content-Type": "application/octet-stream"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            broken = repo.play("cut", name)
            self.wfile.write(data[: len(data) // 2] if broken else data)
            self.close_connection = self.close_connection or broken

    # ---- writing -----------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.token not in (TOKEN, STRANGER):
            raise _Refused(401, "", "Invalid username or password.")
        self.reply(200, {"type": "user", "name": "member" if self.token == TOKEN else "stranger", "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.token != TOKEN:
            status = 401 if self.token != STRANGER else 403
            raise _Refused(
                status,
                "",
                f"You don't have the rights to create a model under the namespace {asked.get('organization')!r}",
            )
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked.get('organization') or 'member'}/{asked['name']}"
        folder = self.server.root / kind / name
        if (folder / "repo.json").exists():
            self.reply(409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"})
            return
        Repo(folder, private=asked.get("visibility") == "private").commit({".gitattributes": b""}, set())
        self.reply(200, {"url": f"{self.server.address}/{name}", "name": name, "id": "0"})

    def validate_yaml(self) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        found = self.repo(kind, repo, for_writing=True)
        before = found.files(self.commit(found, revision))
        answers = []
        for one in json.loads(self.body)["files"]:
            name, mode = one["path"], "lfs" if _is_large(one["path"]) else "regular"
            old = before.get(name)
            oid = None if old is None else (_sha256(old) if mode == "lfs" else _blob_id(old))
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": answers, "commitOid": found.branches["main"]})

    def auth_check(self, kind: str, repo: str) -> None:
        self.repo(kind, repo, for_writing=True)
        self.reply(200, {})

    def branch(self, kind: str, repo: str, revision: str) -> None:
        found = self.repo(kind, repo, for_writing=True)
        if revision in found.branches:
            raise _Refused(409, "", "The branch exists")
        found.branches[revision] = found.branches["main"]
        found.write()
        self.reply(200, {})

    def batch(self, repo: str, kind: str = "models") -> None:
        self.repo(kind.rstrip("/"), repo, for_writing=True)
        objects = []
        for one in json.loads(self.body)["objects"]:
            there = (self.server.root / "lfs" / one["oid"]).is_file()
            target = f"{self.server.address}/lfs/{one['oid']}"
            actions = {"upload": {"href": target}, "verify": {"href": f"{target}/verify"}}
            objects.append({**one, **({} if there else {"actions": actions})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        place = self.server.root / "lfs" / oid
        place.parent.mkdir(exist_ok=True)
        faults = place.parent / "failing.json"
        left = json.loads(faults.read_text()) if faults.is_file() else 0
        if left:
            faults.write_text(json.dumps(left - 1))
            raise _Refused(503, "", "Service Unavailable")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "the content is another one")
        place.write_bytes(self.body)
        self.reply(200)

    def verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        place = self.server.root / "lfs" / oid
        if asked["oid"] != oid or not place.is_file() or place.stat().st_size != asked["size"]:
            raise _Refused(422, "", "the content is not there")
        self.reply(200)

    def commits(self, kind: str, repo: str, revision: str) -> None:
        found = self.repo(kind, repo, for_writing=True)
        if found.play("failing", "commit"):
            raise _Refused(503, "", "Service Unavailable")
        new, deleted = dict[str, bytes | Path](), set[str]()
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = self.server.root / "lfs" / value["oid"]
            elif entry["key"] == "deletedFile":
                deleted.add(value["path"])
        commit = found.commit(new, deleted, revision)
        url = f"{self.server.address}/{repo}/commit/{commit}"
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None})


_KIND = r"(?P<kind>models|datasets)"
ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("GET",), rf"/api/{_KIND}/{_REPO}", Call.info),
    (("GET",), rf"/api/{_KIND}/{_REPO}/revision/{_REVISION}", Call.info),
    (("GET",), rf"/api/{_KIND}/{_REPO}/tree/{_REVISION}(?:/(?P<place>.+))?", Call.tree),
    (("POST",), rf"/api/{_KIND}/{_REPO}/paths-info/{_REVISION}", Call.paths_info),
    (("GET", "HEAD"), rf"/(?P<kind>datasets/)?{_REPO}/resolve/{_REVISION}/(?P<name>.+)", Call.resolve),
    (("GET", "HEAD"), rf"/cdn/{_KIND}/{_REPO}/{_REVISION}/(?P<name>.+)", Call.content),
    (("GET",), r"/api/whoami-v2", Call.whoami),
    (("POST",), r"/api/repos/create", Call.create),
    (("POST",), r"/api/validate-yaml", Call.validate_yaml),
    (("POST",), rf"/api/{_KIND}/{_REPO}/preupload/{_REVISION}", Call.preupload),
    (("GET",), rf"/api/{_KIND}/{_REPO}/auth-check/write", Call.auth_check),
    (("POST",), rf"/api/{_KIND}/{_REPO}/branch/{_REVISION}", Call.branch),
    (("POST",), rf"/(?P<kind>datasets/)?{_REPO}\.git/info/lfs/objects/batch", Call.batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Call.upload),
    (("POST",), r"/lfs/(?P<oid>[0-9a-f]{64})/verify", Call.verify),
    (("POST",), rf"/api/{_KIND}/{_REPO}/commit/{_REVISION}", Call.commits),
]


if __name__ == "__main__":
    hub = Hub(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(hub.address, flush=True)
    hub.serve_forever()
