"""Directories for caches where the user has no home, or one that cannot be written."""

import getpass
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ds import cache
from megatron_ds.cache import cache_folder, scratch_directory, temporary_directory, use_writable_caches
from megatron_ds.errors import ConfigError

NAMES = ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME", "HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")
NOWHERE = "/dev/null/nobody"  # root cannot write there either


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, an empty temporary directory, and no variable set but HOME. Returns this user's part of the latter."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"megatron_ds-{os.getuid()}"


def settings() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ and name != "HOME"}


def test_a_usual_home_is_left_alone(tmp_path: Path) -> None:
    assert use_writable_caches() == "" and settings() == {}
    assert cache_folder("tokens") == tmp_path / "home/.cache/megatron_ds/tokens"
    assert list(tmp_path.joinpath("home").iterdir()) == list(tmp_path.joinpath("tmp").iterdir()) == []


@pytest.mark.parametrize("home", [NOWHERE, "", None])
def test_without_a_home_caches_are_in_the_temporary_directory(
    home: str | None, surroundings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom nobody knows
    else:
        monkeypatch.setenv("HOME", home or NOWHERE)
    said = use_writable_caches()
    assert said.startswith(f"caches are in {surroundings}/xdg_cache_home, as ")
    assert said.endswith("/.cache cannot be written; set XDG_CACHE_HOME to another directory")
    names = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME")
    assert settings() == {name: f"{surroundings}/{name.lower()}" for name in names}
    assert cache_folder("tokens") == surroundings / "xdg_cache_home/megatron_ds/tokens"
    assert surroundings.stat().st_mode & 0o077 == 0
    assert use_writable_caches() == "", "a rank, or a second call, finds them settled"


def test_models_of_a_read_only_home_stay_where_they_are(
    surroundings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was downloaded is read there; data sets are written elsewhere."""
    models = tmp_path / "home/.cache/huggingface"
    models.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tmp_path / "home")))
    use_writable_caches()
    cache = surroundings / "xdg_cache_home"
    assert os.environ["HF_HOME"] == str(models)
    assert os.environ["HF_DATASETS_CACHE"] == f"{cache}/huggingface/datasets"
    assert os.environ["HF_MODULES_CACHE"] == f"{cache}/huggingface/modules"


def test_shared_models_that_are_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", NOWHERE)
    monkeypatch.setenv("HF_MODULES_CACHE", "/own")
    assert use_writable_caches() == ""
    assert settings() == {
        "HF_HOME": NOWHERE,
        "HF_MODULES_CACHE": "/own",
        "HF_DATASETS_CACHE": f"{tmp_path}/home/.cache/huggingface/datasets",
    }


def test_a_variable_that_names_no_usable_directory(surroundings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", NOWHERE)
    assert use_writable_caches().startswith(f"caches are in {surroundings}/xdg_cache_home, as {NOWHERE} cannot be")
    assert settings() == {"XDG_CACHE_HOME": f"{surroundings}/xdg_cache_home"}


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    environ = dict(os.environ)
    environ.pop("USER", None)
    use_writable_caches(environ)
    assert "USER" not in environ
    monkeypatch.setattr(getpass, "getuser", unknown)
    use_writable_caches(environ)
    assert environ["USER"] == f"uid_{os.getuid()}"


def test_another_users_directory_is_not_used(surroundings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", NOWHERE)
    surroundings.symlink_to("/etc")
    with pytest.raises(ConfigError, match=r"megatron_ds-\d+ belongs to another user.*; set XDG_CACHE_HOME to one"):
        use_writable_caches()


def test_no_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [NOWHERE])
    monkeypatch.setenv("TMPDIR", NOWHERE)
    with pytest.raises(ConfigError, match=rf"TMPDIR={NOWHERE}: neither it nor /tmp can be written; set TMPDIR"):
        temporary_directory()


def test_a_full_temporary_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, other, real = tmp_path / "usual", tmp_path / "other", os.statvfs
    usual.mkdir()
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    monkeypatch.setattr(cache, "_MORE_TEMPORARY", (NOWHERE, str(other)))
    assert scratch_directory() == usual
    room = {usual: 4096}

    def statvfs(place: Path) -> Any:
        found = real(place)
        return SimpleNamespace(
            f_files=found.f_files, f_favail=found.f_favail, f_frsize=1, f_bavail=room.get(place, 2**30)
        )

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert scratch_directory() == other
    room[other] = 4096
    assert scratch_directory() == usual, "whatever is written there then says that it is full"
