"""Damaged caches: of every kind and file, what is read is what was written, and a line says so."""

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data.readers import cache_checksums
from megatron_ds.errors import DataError
from tests.data.cache_mutations import CacheCase, cache_cases, damaged, entry_files

CASES = ("text", "blend", "chat", "rows", "labelled", "indexed")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str, chat_tokenizer: Any) -> dict[str, CacheCase]:
    folder = tmp_path_factory.mktemp("cached")
    return {one.name: one for one in cache_cases(folder, tokenizer_path, chat_tokenizer("header"))}


def is_checksums(file: Path) -> bool:
    return "checksums" in file.name


def check_mutations(case: CacheCase, cache: Path, seeds: range, caplog: pytest.LogCaptureFixture) -> None:
    """Damage a file, a different one for each seed, and compare what is read then."""
    expected = case.samples(cache)
    for seed in seeds:
        chance = random.Random(seed)
        files = entry_files(cache)
        file = files[seed % len(files)]
        before = file.stat()
        file.write_bytes(damaged(file.read_bytes(), chance))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        caplog.clear()
        assert case.samples(cache) == expected, (seed, file.name)
        lines = [line for line in caplog.messages if "damaged" in line and "again" in line]
        # lengths are read by mixes of lengths only
        assert len(lines) == (file.suffix != ".lengths"), (seed, file.name, caplog.messages)


@pytest.mark.parametrize("name", CASES)
def test_damage_is_found_and_mended(
    cases: dict[str, CacheCase], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_mutations(cases[name], tmp_path, range(6), caplog)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_more_damage(cases: dict[str, CacheCase], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_mutations(cases[name], tmp_path, range(6, 306), caplog)


@pytest.fixture(scope="module")
def earlier(cases: dict[str, CacheCase], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Name of a case -> its cache as an earlier version has written it."""

    def get(name: str) -> Path:
        cache = tmp_path_factory.mktemp(name)
        cases[name].samples(cache)
        for file in filter(is_checksums, entry_files(cache)):
            file.unlink()
        return cache

    yield get


@pytest.mark.parametrize("name", CASES)
def test_an_entry_of_an_earlier_version_is_used_and_gets_checksums(
    cases: dict[str, CacheCase], name: str, earlier: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache = earlier(name)
    before = {file: file.stat().st_ino for file in entry_files(cache)}
    with caplog.at_level(logging.INFO):
        first = cases[name].samples(cache)
    assert any("has no checksums" in line for line in caplog.messages)
    assert {file: file.stat().st_ino for file in before} == before and any(map(is_checksums, entry_files(cache)))
    caplog.clear()
    assert cases[name].samples(cache) == first and not caplog.messages


@pytest.mark.parametrize("name", ["chat", "rows", "indexed"])
def test_the_temporary_file_of_another_process_is_not_of_the_entry(
    cases: dict[str, CacheCase], name: str, earlier: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks that find an entry of an earlier version add its checksums at the same time."""
    cache = earlier(name)
    others = [
        folder / ".checksums.json.0123456789abcdef.tmp" for folder in {file.parent for file in entry_files(cache)}
    ]
    for file in others:
        file.write_text("{")
    first = cases[name].samples(cache)
    for file in others:
        file.unlink(missing_ok=True)
    assert cases[name].samples(cache) == first
    for file in others:
        file.write_text("{")
    assert cases[name].samples(cache) == first and not [line for line in caplog.messages if "damaged" in line]


def check_earlier(case: CacheCase, cache: Path, seeds: range) -> tuple[int, int]:
    """Damage entries without checksums: only the project's errors come of it; return how often, and of how many."""
    refused = 0
    whole = cache.with_name(f"{cache.name}.whole")
    shutil.copytree(cache, whole)
    for seed in seeds:
        shutil.rmtree(cache)
        shutil.copytree(whole, cache)
        files = entry_files(cache)
        file = files[seed % len(files)]
        file.write_bytes(damaged(file.read_bytes(), random.Random(seed)))
        try:
            case.samples(cache)
        except DataError:
            refused += 1
    return refused, len(seeds)


@pytest.mark.parametrize("name", CASES)
def test_damage_before_there_were_checksums_raises_nothing_else(
    cases: dict[str, CacheCase], name: str, earlier: Any
) -> None:
    check_earlier(cases[name], earlier(name), range(5))


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_more_damage_before_there_were_checksums(cases: dict[str, CacheCase], name: str, earlier: Any) -> None:
    check_earlier(cases[name], earlier(name), range(5, 205))


def test_a_pipe_or_a_link_to_a_device_is_no_entry(cases: dict[str, CacheCase], tmp_path: Path) -> None:
    expected = cases["text"].samples(tmp_path)
    (tokens,) = tmp_path.glob("*.bin")
    tokens.unlink()
    os.mkfifo(tokens)
    assert cases["text"].samples(tmp_path) == expected
    (checksums,) = tmp_path.glob("*.checksums")
    checksums.unlink()
    checksums.symlink_to("/dev/zero")
    assert cases["text"].samples(tmp_path) == expected
    assert cases["indexed"].samples(tmp_path)
    (bounds,) = tmp_path.glob("*.indices/bounds.npy")
    bounds.unlink()
    os.mkfifo(bounds)
    assert cases["indexed"].samples(tmp_path)


def test_a_planted_link_takes_no_writes(cases: dict[str, CacheCase], tmp_path: Path) -> None:
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    expected = cases["text"].samples(cache)
    victim.write_text("mine")
    for file in entry_files(cache):
        file.unlink()
        file.symlink_to(victim)
    assert cases["text"].samples(cache) == expected
    assert victim.read_text() == "mine" and not any(file.is_symlink() for file in entry_files(cache))
    assert not list(cache.glob("*.tmp")) + list(cache.glob(".*.tmp"))


def test_a_damaged_entry_that_cannot_be_made_again_is_refused(
    cases: dict[str, CacheCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases["text"].samples(tmp_path)
    (tokens,) = tmp_path.glob("*.bin")
    tokens.write_bytes(bytes(tokens.stat().st_size))

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("megatron_ds.data.text.token_cache._write_tokens", read_only)
    with pytest.raises(DataError, match=r"cannot be written .*Read-only file system; its tokens are damaged: bin diff"):
        cases["text"].samples(tmp_path)


@pytest.mark.parametrize(("mode", "owner", "is_refused"), [(0o1777, 0, True), (0o777, 4242, False), (0o775, 0, False)])
def test_entries_of_strangers_where_everyone_may_write(
    cases: dict[str, CacheCase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    owner: int,
    is_refused: bool,
) -> None:
    if os.getuid() != 0:
        pytest.skip("files can be given to other users by root only")
    cases["text"].samples(tmp_path)
    for file in entry_files(tmp_path):
        os.chown(file, 4242, -1)
    os.chown(tmp_path, owner, -1)
    tmp_path.chmod(mode)
    if not is_refused:
        assert cases["text"].samples(tmp_path)
        return
    with pytest.raises(DataError, match=r"belongs to user 4242, and everyone may write there; set data\.cache_dir"):
        cases["text"].samples(tmp_path)


def test_what_a_network_disk_gives_to_nobody_is_ones_own(
    cases: dict[str, CacheCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS with root_squash: root's files belong to nobody, in a directory of someone else that everyone may write."""
    if os.getuid() != 0:
        pytest.skip("files can be given to other users by root only")
    expected = cases["text"].samples(tmp_path)
    for file in entry_files(tmp_path):
        os.chown(file, 65534, -1)
    os.chown(tmp_path, 1000, -1)
    tmp_path.chmod(0o777)
    assert cache_checksums._owner_of_new_files(tmp_path) == 0
    monkeypatch.setattr(cache_checksums, "_owner_of_new_files", lambda directory: 65534)
    assert cases["text"].samples(tmp_path) == expected


def test_a_file_is_read_once_while_it_stays_as_it_is(
    cases: dict[str, CacheCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases["text"].samples(tmp_path)
    monkeypatch.setattr("megatron_ds.digests._SETTLED_NS", 0)
    digest, read = cache_checksums.known_xxh3, []
    monkeypatch.setattr("megatron_ds.digests.file_xxh3", lambda path: read.append(path) or "")
    (tokens,) = tmp_path.glob("*.bin")
    digest(tokens), digest(tokens)
    assert read == [tokens]
    os.utime(tokens, (1, 1))
    digest(tokens)
    assert read == [tokens] * 2
