"""What an export may replace: an unchanged export of ours, anything else on demand, and some things never."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ds.errors import ConversionError
from megatron_ds.hf.export_mark import MARK, first_change
from megatron_ds.hf.export_target import ExportTarget, covers

WEIGHTS = b"weights" * 100


def write(target: ExportTarget, weights: bytes = WEIGHTS) -> None:
    """Export two files."""
    new = target.begin()
    (new / "config.json").write_text("{}")
    (new / "model.safetensors").write_bytes(weights)
    target.put(new)


def tree(place: Path) -> dict[str, bytes | str | None]:
    """All that is under a place, links not followed: path -> content, link or None for a directory."""
    return {
        str(path.relative_to(place)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(place.rglob("*"))
    }


def refusal(target: ExportTarget) -> str:
    with pytest.raises(ConversionError) as caught:
        target.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An export."""
    write(ExportTarget(tmp_path / "out"))
    return tmp_path / "out"


def test_an_export_is_replaced_by_the_next(out: Path) -> None:
    write(ExportTarget(out), b"other")
    assert (out / "model.safetensors").read_bytes() == b"other"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    files = json.loads((out / MARK).read_text())["files"]
    assert files.keys() == {"config.json", "model.safetensors"} and files["model.safetensors"]["bytes"] == 5


def test_nothing_and_an_empty_directory_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/new"):
        write(ExportTarget(tmp_path / name))
        assert (tmp_path / name / "model.safetensors").read_bytes() == WEIGHTS


def add(out: Path) -> None:
    (out / "README.md").touch()


def add_deep(out: Path) -> None:
    (out / "onnx").mkdir()
    (out / "onnx" / "model.onnx").touch()


def add_link(out: Path) -> None:
    (out / "tokenizer.json").symlink_to("/nowhere")


def remove(out: Path) -> None:
    (out / "config.json").unlink()


def change(out: Path) -> None:
    (out / "config.json").write_text("[]")


def link(out: Path) -> None:
    shutil.move(out / "config.json", out.parent / "config.json")
    (out / "config.json").symlink_to(out.parent / "config.json")


def unmark(out: Path) -> None:
    (out / MARK).unlink()


def damage(out: Path) -> None:
    (out / MARK).write_text('{"files": {"config.json": 3}}')


CHANGES: dict[Callable[[Path], None], str] = {
    add: "holds README.md, which was added after the export",
    add_deep: "holds onnx/model.onnx, which was added after the export",
    add_link: "holds tokenizer.json, which was added after the export",
    remove: "lacks config.json, which was removed after the export",
    change: "holds config.json, which was changed after the export",
    link: "holds config.json, which was changed after the export",
    unmark: f"has no mark of an export (earlier versions wrote no {MARK})",
    damage: f"holds a damaged {MARK}",
}


@pytest.mark.parametrize("act", CHANGES, ids=lambda act: act.__name__)
def test_a_changed_export_is_replaced_on_demand_only(act: Callable[[Path], None], out: Path) -> None:
    act(out)
    before = tree(out.parent)
    told = f"{out} would be replaced, and {CHANGES[act]}; choose another directory, or try --overwrite"
    assert refusal(ExportTarget(out)) == told
    assert tree(out.parent) == before
    write(ExportTarget(out, overwrite=True), b"other")
    assert tree(out).keys() == {MARK, "config.json", "model.safetensors"}
    assert first_change(out, out, thorough=True) is None


def test_a_change_that_keeps_length_and_time_is_found_before_it_is_replaced(out: Path) -> None:
    file = out / "model.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"W" + WEIGHTS[1:])
    os.utime(file, ns=times)
    with pytest.raises(ConversionError, match=r"holds model\.safetensors, which was changed .* are in .*/out\.1$"):
        write(ExportTarget(out), b"other")
    assert file.read_bytes() == b"W" + WEIGHTS[1:]
    assert (out.parent / "out.1" / "model.safetensors").read_bytes() == b"other"


def test_a_copy_of_an_export_is_none(out: Path) -> None:
    """Such as a base model that came from another run's export."""
    shutil.copytree(out, out.parent / "base")
    told = "base would be replaced, and is a moved or copied export; choose another directory, or try --overwrite"
    assert refusal(ExportTarget(out.parent / "base")).endswith(told)


def test_a_touched_file_is_no_change(out: Path) -> None:
    os.utime(out / "config.json", ns=(1, 1))
    before = tree(out)
    write(ExportTarget(out), b"other")
    assert tree(out) != before


def test_a_file_that_comes_while_it_is_written_is_kept_and_the_export_too(out: Path) -> None:
    before = tree(out)
    for number in (1, 2):
        target = ExportTarget(out, "export.path", option="export.overwrite=true")
        new = target.begin()
        (new / "model.safetensors").write_bytes(b"hours")
        (out / "notes.txt").write_text("mine")
        with pytest.raises(ConversionError) as caught:
            target.put(new)
        assert str(caught.value) == (
            f"export.path={out} would be replaced, and holds notes.txt, which was added after the export; choose "
            f"another directory, or try export.overwrite=true; the new files are in {out}.{number}"
        )
        assert Path(f"{out}.{number}/model.safetensors").read_bytes() == b"hours"
    assert tree(out) == {**before, "notes.txt": b"mine"}
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.1", "out.2"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_failed_replacement_puts_the_old_directory_back(
    overwrite: bool, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, original = tree(out), os.replace

    def replace(source: Path, target: Path) -> None:
        if target == out and source.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConversionError, match=r"cannot be replaced \(Input/output error\); the new files are in"):
        write(ExportTarget(out, overwrite=overwrite), b"other")
    assert tree(out) == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.1"]


# ---- never -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a checkpoint in a run's output, links to them, a home and a current directory."""
    for name in ("models/base/onnx", "run/checkpoints/step_00000002/training_state", "me/home", "work/here", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "base" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "models" / "base" / "onnx" / "model.onnx").write_bytes(WEIGHTS)
    for name in ("run/config.yaml", "run/metrics.jsonl", "data/corpus.txt", "me/home/thesis.tex", "work/here/a.txt"):
        (tmp_path / name).touch()
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "training_state" / "manifest.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "models" / "base")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "models" / "base" / "model.safetensors")
    (tmp_path / "data" / "base").symlink_to(tmp_path / "models" / "base")
    monkeypatch.setenv("HOME", str(tmp_path / "me" / "home"))
    monkeypatch.chdir(tmp_path / "work" / "here")
    return tmp_path


NEVER = {
    "models/base": "would replace model.path",
    "models": "would replace model.path",
    "link": "would replace model.path",
    "run/../models/base/onnx/..": "would replace model.path",
    "models/base/onnx": "would be replaced, and is part of model.path",
    "run/checkpoints/step_00000002": "would be replaced, and holds training_state of a checkpoint",
    "run/checkpoints/step_00000002/training_state": "would be replaced, and is part of the checkpoint",
    "run/checkpoints": "would be replaced, and holds step_00000002/training_state of a checkpoint",
    "run": "would be replaced, and holds metrics.jsonl of a run, whose output is never replaced",
    "me/home": "would replace the home directory",
    "me": "would replace the home directory",
    "work/here": "would replace the current directory",
    "work": "would replace the current directory",
    ".": "would replace",
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", NEVER)
def test_some_places_are_never_replaced(name: str, overwrite: bool, places: Path) -> None:
    before = tree(places)
    kept = {"model.path": places / "models" / "base"}
    assert NEVER[name] in (told := refusal(ExportTarget(places / name, overwrite=overwrite, kept=kept)))
    assert told.endswith("; choose another directory"), "another option would not help"
    assert tree(places) == before


@pytest.mark.parametrize(
    ("target", "kept"),
    [("models", "linked"), ("models/base", "linked"), ("models/base", "link"), ("data", "data/base")],
)
def test_a_place_is_kept_with_the_links_that_lead_to_it_and_from_it(target: str, kept: str, places: Path) -> None:
    told = refusal(ExportTarget(places / target, overwrite=True, kept={"what is read": places / kept}))
    assert "would replace what is read" in told


def test_the_root_directory_is_never_replaced() -> None:
    assert refusal(ExportTarget(Path("/"), overwrite=True)).startswith("/ would replace the root directory")


def test_a_directory_under_another_name_of_the_same_directory(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another mount, or a file system that ignores case: the names differ, and the device and inode do not."""
    other = places / "mounted"
    shutil.copytree(places / "models" / "base", other)
    original = Path.stat, os.path.samefile

    def stand_in(path: Path | str) -> Path:
        inside = Path(path).is_relative_to(other)
        return places / "models" / "base" / Path(path).relative_to(other) if inside else Path(path)

    monkeypatch.setattr(os.path, "samefile", lambda one, two: original[1](stand_in(one), stand_in(two)))
    monkeypatch.setattr(Path, "stat", lambda self, **given: original[0](stand_in(self), **given))
    assert covers(other, places / "models" / "base") and not covers(other, places / "models")
    (places / "more").mkdir()
    os.rename(other, places / "more" / "mounted")
    other = places / "more" / "mounted"
    kept = {"model.path": places / "models" / "base"}
    told = refusal(ExportTarget(places / "more", overwrite=True, kept=kept))
    assert told.endswith("would be replaced, and holds mounted/, which is read; choose another directory")


def test_a_file_and_an_unreadable_directory_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    told = refusal(ExportTarget(tmp_path / "file", overwrite=True))
    assert told.endswith("/file is a file; choose another place for the directory")

    def iterdir(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert "cannot be read (Permission denied)" in refusal(ExportTarget(tmp_path))


def test_a_checkpoint_gets_no_mark(tmp_path: Path) -> None:
    target = ExportTarget(tmp_path / "out")
    new = target.begin()
    (new / "training_state").mkdir()
    target.put(new)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training_state"]
