"""Files on an S3 server and on a web server: listed, read, written, with further tries, and errors in one line."""

import time
from pathlib import Path

import pytest

from megatron_ds.errors import ConfigError, RemoteError
from megatron_ds.remote import Store, as_url, is_url, local_data, require_client
from tests.remote.conftest import WebServer


def test_urls_and_the_packages_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_url, ("s3://b/c", "gs://b", "https://a/b", "s3:/b/c")))
    assert not any(map(is_url, ("a/b", "/a", "file:///a", "c:/a", "C:/a/b")))
    assert as_url("s3:/b/c") == "s3://b/c", "what a Path makes of it"
    require_client("s3://bucket/data", "data: URL")
    with pytest.raises(ConfigError, match=r"^x: ftpx:// is not one of s3://, s3a://, gs://"):
        require_client("ftpx://a/b", "x")
    with pytest.raises(ConfigError, match=r"^x: a web server cannot be written to; try s3://BUCKET/NAME"):
        require_client("http://a/b", "x", writes=True)
    with pytest.raises(ConfigError, match=r"^data.train\[0\]: a URL has a password.*leave it out") as refused:
        require_client("https://me:secret@a/b.txt", "data.train[0]=https://me:secret@a/b.txt")
    assert "secret" not in str(refused.value)
    monkeypatch.setattr("megatron_ds.remote.urls.find_spec", lambda name: None if name == "s3fs" else name)
    with pytest.raises(ConfigError, match=r"needs the package s3fs; try pip install 'megatron-ds\[remote\]'$"):
        require_client("s3://a/b", "x")


def test_an_object_store(s3: str, tmp_path: Path) -> None:
    store = Store(s3, "checkpoint.copy_to")
    assert store.list() == [] and store.read_text("latest") is None
    for name in ("a", "b/c", "manifest"):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    files = {name: tmp_path / "here" / name for name in ("a", "b/c", "manifest")}
    store.begin_upload(files, last=["manifest"]).result()
    store.write_text("latest", "b\n")
    found = store.list()
    assert [(one.name, one.size) for one in found] == [("a", 12), ("b/c", 14), ("latest", 2), ("manifest", 19)]
    assert all(one.version for one in found) and store.read_text("latest") == "b\n"
    store.download({"b/c": tmp_path / "got" / "c"}, found)
    assert (tmp_path / "got" / "c").read_text() == "content of b/c" and len([*(tmp_path / "got").iterdir()]) == 1
    store.remove(["a", "manifest", "latest"], first=["manifest"])
    assert [one.name for one in store.list()] == ["b/c"]


def test_copies_of_files_directories_and_patterns(s3: str, tmp_path: Path) -> None:
    for name in ("data/a.txt", "data/b.txt", "data/deep/c.txt", "other.txt"):
        Store(s3, "x").write_text(name, name)
    assert local_data(f"{s3}/other.txt", "data: URL").read_text() == "other.txt"
    folder = local_data(f"{s3}/data", "data: URL")
    assert sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*.txt")) == [
        "a.txt",
        "b.txt",
        "deep/c.txt",
    ]
    some = local_data(f"{s3}/data/*.txt", "data: URL")
    assert sorted(one.name for one in some.iterdir()) == ["a.txt", "b.txt"]
    Store(s3, "x").write_text("other.txt", "changed")
    assert local_data(f"{s3}/other.txt", "data: URL").read_text() == "other.txt", "one version a run"
    local_data.cache_clear()
    assert local_data(f"{s3}/other.txt", "data: URL").read_text() == "changed"
    with pytest.raises(RemoteError, match=r"^data: URL does not exist, or holds no file; check"):
        local_data(f"{s3}/none", "data: URL")


def test_a_web_server_that_fails_for_a_while(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "web" / "corpus.txt").write_text("some text")
    web.failures = 2
    copy = local_data(f"{web.url}/corpus.txt", "data: URL")
    assert copy.name == "corpus.txt" and copy.read_text() == "some text"
    before = len(web.requests)
    local_data.cache_clear()
    assert local_data(f"{web.url}/corpus.txt", "data: URL") == copy
    assert len(web.requests) - before <= 2, "its size and version are asked for, and nothing is downloaded"


def test_a_server_that_is_away(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "web" / "corpus.txt").write_text("some text")
    web.failures = 100
    with pytest.raises(RemoteError, match=r"^data: URL cannot be reached, also after more "):
        local_data(f"{web.url}/corpus.txt", "data: URL")
    web.close()
    began = time.monotonic()
    with pytest.raises(RemoteError, match="cannot be reached, also after more tries"):
        local_data(f"{web.url}/other.txt", "data: URL")
    assert time.monotonic() - began < 30


def test_a_process_that_dies_is_named_and_replaced(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "web" / "corpus.txt").write_text("some text")
    store = Store(f"{web.url}/corpus.txt", "data: URL")
    assert store.list()[0].size == 9
    worker = store._worker
    assert worker is not None
    worker._process.kill()
    with pytest.raises(RemoteError, match=r"^data: URL has failed .its process ended with status -9"):
        store.list()
    assert store.list()[0].size == 9


def test_a_disk_that_cannot_be_written_is_no_problem_of_the_store(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "web" / "corpus.txt").write_text("some text")
    (tmp_path / "file").touch()
    before = len(web.requests)
    with pytest.raises(RemoteError, match=r"^x has failed on this machine's disk \(.*Not a directory.*/file/deep"):
        Store(web.url, "x").download({"corpus.txt": tmp_path / "file" / "deep" / "copy"})
    assert len(web.requests) == before, "further tries do not help"


def test_ranks_that_link_indexed_files_at_once(web: WebServer, tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / "web" / f"corpus{ending}").write_text(ending)
    url = f"{web.url}/corpus"
    path = local_data(url, "data: URL", prefix=True)
    before = path.with_suffix(".bin").lstat().st_ino
    local_data.cache_clear()
    assert local_data(url, "data: URL", prefix=True) == path
    assert path.with_suffix(".bin").lstat().st_ino == before, "another rank may be opening it"
    (tmp_path / "web" / "corpus.bin").write_text("changed")
    local_data.cache_clear()
    changed = local_data(url, "data: URL", prefix=True)
    assert changed.with_suffix(".bin").read_text() == "changed" and path.with_suffix(".bin").read_text() == ".bin"


def test_a_server_that_is_away_is_not_asked_for_every_file(web: WebServer, tmp_path: Path) -> None:
    web.failures = 10_000
    files = {f"{number}.txt": tmp_path / f"{number}.txt" for number in range(100)}
    with pytest.raises(RemoteError, match="cannot be reached, also after more tries"):
        Store(web.url, "x").download(files)
    assert len(web.requests) < 200, "with four tries of each it would be 400"
