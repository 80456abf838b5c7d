"""Files and directories that get their name when they are complete."""

import os
import stat
import time
from pathlib import Path

import pytest

from megatron_ds.atomic import replacing, temporary_folder


def test_the_temporary_name_is_drawn_and_gone_after_success_and_failure(tmp_path: Path) -> None:
    path, names = tmp_path / "a", set()
    for number in range(3):
        with replacing(path, durable=True) as temporary:
            names.add(temporary.name)
            temporary.write_text(str(number))
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert len(names) == 3 and path.read_text() == "2" and list(tmp_path.iterdir()) == [path]
    with temporary_folder(path) as folder:
        (folder / "b").write_text("x")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("x")
        (tmp_path / "b").write_text("x")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "b")}
    assert modes == {0o666 & ~mask}


def test_a_link_under_the_name_is_replaced_and_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a"
    victim.write_text("mine")
    path.symlink_to(victim)
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    planted = tmp_path / ".a.guessed.tmp"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError), replacing(path):
        pass
    planted.unlink()
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert victim.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


def test_left_overs_of_killed_processes_are_removed_a_day_later(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".a.0123.tmp", ".a.4567.tmp", ".b.0123.tmp"))
    folder = tmp_path / ".a.89ab.tmp"
    folder.mkdir()
    (folder / "b").write_text("x")
    for path in (old, young, other):
        path.write_text("x")
    for path in (old, other, folder):
        os.utime(path, (time.time() - 90_000,) * 2)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"a", young.name, other.name}
