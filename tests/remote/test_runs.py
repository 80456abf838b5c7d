"""Runs on data at URLs, whose checkpoints and exports go to an object store, and which resume from there."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint import remote_copies
from megatron_ds.checkpoint.directory import remove_leftovers
from megatron_ds.checkpoint.remote_copies import RemoteCopies, complete_steps, fetch_newest, set_copies_aside
from megatron_ds.cli.main import _run
from megatron_ds.config import RunConfig, build_run
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.errors import ConfigError, RemoteError
from megatron_ds.hub import describe_upload
from megatron_ds.remote import Store, local_data, upload_model
from megatron_ds.remote.models import local_model
from megatron_ds.training.launch import train
from megatron_ds.training.model_paths import with_directories
from megatron_ds.training.resume import abandoned_copies
from tests.ranks import preload
from tests.training.tiny import run_mapping


def make_run(corpus: Path, output: Path, **sections: dict[str, Any]) -> RunConfig:
    mapping = run_mapping(corpus, output)
    for name, fields in sections.items():
        mapping[name] = {**mapping.get(name, {}), **fields}
    return build_run(mapping)


def names_at(url: str) -> list[str]:
    return [one.name for one in Store(url, "x").list()]


def test_a_run_that_lost_its_disk_resumes_from_the_copies(
    s3: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(s3, "x")
    store.begin_upload({"train.txt": corpus / "train.txt"}).result()
    data = {"train": [f"{s3}/train.txt"], "valid": []}
    checkpoint = {"every": 2, "keep": 1, "copy_to": f"{s3}/copies"}
    preload()
    constant = {"name": "constant"}
    whole = train(make_run(corpus, tmp_path / "whole", train={"steps": 8}, schedule=constant), 1)

    shared = {"data": data, "checkpoint": checkpoint, "schedule": constant}
    train(make_run(corpus, tmp_path / "lost", **shared, train={"steps": 5}), 2)
    found = names_at(f"{s3}/copies")
    assert complete_steps(found) == [5] and store.read_text("copies/latest") == "step_00000005\n"
    assert {name.partition("/")[0] for name in found} == {"step_00000005", "latest"}, "keep: 1"
    shutil.rmtree(tmp_path / "lost")

    export = {"path": str(tmp_path / "hf"), "push_to": f"{s3}/exports/hf"}
    result = train(make_run(corpus, tmp_path / "lost", **shared, export=export, train={"steps": 8}), 1)
    assert result.steps == 8 and result.last_loss == pytest.approx(whole.last_loss, rel=1e-6)
    lines = (tmp_path / "lost" / "metrics.jsonl").read_text().splitlines()
    assert '"step": 6' in lines[0], "nothing before the checkpoint was done again"
    assert {"config.json", "model.safetensors"} <= set(names_at(f"{s3}/exports/hf"))

    local_data.cache_clear()
    capsys.readouterr()
    assert _run(["inspect", f"{s3}/copies"]) == 0 and "intact      all checksums match" in capsys.readouterr().out
    assert _run(["export", f"{s3}/copies", str(tmp_path / "from_copy"), "--dtype", "float32"]) == 0
    mine, theirs = (tmp_path / name / "model.safetensors" for name in ("from_copy", "hf"))
    assert mine.read_bytes() == theirs.read_bytes()
    tuned = make_run(
        corpus, tmp_path / "tuned", model={"config": None, "path": f"{s3}/exports/hf", "init": "pretrained"}
    )
    train(tuned, 1)
    assert f"path: '{s3}/exports/hf'" in (tmp_path / "tuned" / "config.yaml").read_text()


def test_a_copy_without_its_manifest_does_not_count(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoint(step: int) -> Path:
        path = tmp_path / "folder" / f"step_{step:08d}"
        for name in ("training_state/manifest.json", "training_state/progress.json", "config.json"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(f"{step}")
        return path

    notes: list[str] = []
    copies = RemoteCopies(s3, tmp_path / "folder", 3, notes.append)
    for step in (1, 2):
        copies.begin(checkpoint(step))
        copies.finish()
    assert [note.split(" (")[0] for note in notes] == [f"copied step_0000000{step} to {s3}" for step in (1, 2)]
    assert not [*(tmp_path / "folder" / ".copying").iterdir()]

    Store(s3, "x").remove(["step_00000002/training_state/manifest.json"])  # as if it had been cut off
    assert fetch_newest(s3, tmp_path / "other", -1) == 1
    assert (tmp_path / "other/step_00000001/config.json").read_text() == "1"
    assert fetch_newest(s3, tmp_path / "other", 1) is None
    assert set_copies_aside(s3, 0) == [
        f"checkpoint.copy_to={s3}: step_00000001 set aside: manifest.json is now manifest.json.aside"
    ]
    assert fetch_newest(s3, tmp_path / "third", -1) is None and set_copies_aside(s3, 0) == []

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MEGATRON_DS_REMOTE_WAITS_S", "0.05")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    away = RemoteCopies(s3, tmp_path / "folder", 3, notes.append)
    away.begin(checkpoint(3))
    with pytest.raises(RemoteError, match=r"^checkpoint.copy_to=s3://.* cannot be reached.*step_00000003 is complete$"):
        away.finish()
    assert remote_copies.complete_steps(["step_00000003/config.json"]) == []


def test_what_is_refused_before_anything_is_spent(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in (
        ("copies", "checkpoint.copy_to=copies is no URL; write s3://bucket/name"),
        ("https://a/b", "checkpoint.copy_to=https://a/b: a web server cannot be written to; try s3://BUCKET/NAME"),
    ):
        with pytest.raises(ConfigError) as refused:
            make_run(corpus, tmp_path / "out", checkpoint={"every": 2, "copy_to": wrong})
        assert str(refused.value).startswith(message)
    with pytest.raises(ConfigError, match=r"copies checkpoints, and checkpoint\.every=0 writes none; try checkpoint"):
        make_run(corpus, tmp_path / "out", checkpoint={"every": 0, "copy_to": "s3://bucket/run"})
    assert _run(["export", str(tmp_path), "s3://a/b"]) == 2
    error = capsys.readouterr().err
    assert error == "error: HF_DIR=s3://a/b is a URL, and must be a path on a disk; --push-to uploads to a URL\n"
    inputs = [str(corpus / "train.txt"), "--tokenizer", "bytes", "--output", "gs://a/b"]
    assert _run(["prepare", *inputs]) == 2 and "--output=gs://a/b is a URL, and must" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["output", "data.cache_dir", "export.path", "deepspeed"])
def test_what_is_on_a_disk_cannot_be_a_url(field: str, corpus: Path, tmp_path: Path) -> None:
    mapping, (section, _, key) = run_mapping(corpus, tmp_path), field.partition(".")
    mapping[section] = {**mapping.get(section, {}), key: "s3://a/b"} if key else "s3://a/b"
    with pytest.raises(ConfigError, match=rf"^{field}=s3://a/b is a URL, and must be a path on a disk; "):
        build_run(mapping)


def checkpoint_of(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:08d}"
    (path / "training_state").mkdir(parents=True)
    (path / "training_state/manifest.json").write_text(f"{step}")
    return path


def test_a_copy_that_cannot_begin_is_noted_and_fails_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    notes: list[str] = []
    copies = RemoteCopies("s3://bucket/run", tmp_path, 3, notes.append)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        copies.begin(checkpoint_of(tmp_path, 1))
    (tmp_path / ".copying/step_00000001").mkdir(parents=True)  # as after a crash
    remove_leftovers(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["step_00000001"]
    assert notes == ["step_00000001 is not copied: [Errno 28] No space left on device; the next checkpoint is"]
    with pytest.raises(
        RemoteError, match=r"^checkpoint.copy_to=s3://bucket/run: .*No space left.*00000001 is complete"
    ):
        copies.finish()


def test_a_copy_whose_predecessors_stay_is_complete(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: Any, **more: Any) -> None:
        raise RemoteError("no permission")

    notes: list[str] = []
    copies = RemoteCopies(s3, tmp_path, 1, notes.append)
    monkeypatch.setattr(Store, "remove", denied)
    for step in (1, 2):
        copies.begin(checkpoint_of(tmp_path, step))
        copies.finish()
    assert notes[-1] == "older copies stay: no permission" and notes[-2].startswith("copied step_00000002 to ")


def test_copies_of_another_run_are_set_aside(s3: str, corpus: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        Store(s3, "x").write_text(f"step_{step:08d}/training_state/manifest.json", f"{step}")
    run = make_run(corpus, tmp_path / "out", checkpoint={"every": 2, "copy_to": s3})
    other = checkpoint_of(tmp_path / "other", 2)
    assert abandoned_copies(run, other) == -1, "all copies are of another run"
    assert abandoned_copies(run, checkpoint_of(tmp_path / "out/checkpoints", 2)) == 2
    copy = local_model(s3, "x", with_state=True)
    assert abandoned_copies(run, Path(copy)) == 3, "the run goes on from this copy"


def test_a_run_resumes_without_the_model_at_a_url_that_is_gone(corpus: Path, tmp_path: Path, web: Any) -> None:
    model = {"config": None, "path": f"{web.url}/gone", "init": "pretrained"}
    run = make_run(corpus, tmp_path / "out", model=model)
    with pytest.raises(RemoteError, match=r"^model.path=http://.*/gone has no config.json"):
        with_directories(run, None)
    checkpoint = checkpoint_of(tmp_path, 1)
    found = with_directories(run, checkpoint)
    assert found.model.path == str(checkpoint)


def test_lines_on_uploads() -> None:
    assert describe_upload("s3://a/b", "s3://a/b") == "uploaded to s3://a/b"
    assert describe_upload("org/name", "https://hub/commit") == "uploaded to the hub: https://hub/commit"


def test_an_upload_that_fails_says_where_the_model_is(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").mkdir()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MEGATRON_DS_REMOTE_WAITS_S", "0.05")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(RemoteError, match=rf"^export.push_to=URL cannot be reached.*; {tmp_path}/hf is complete: try "):
        upload_model(tmp_path / "hf", s3, "export.push_to=URL")


def test_a_tokenizer_at_a_url(s3: str, tmp_path: Path, corpus: Path) -> None:
    for name in ("model/step_00000001/config.json", "model/step_00000001/training_state/manifest.json"):
        Store(s3, "x").write_text(name, "{}")
    files = {f"model/step_00000001/{one.name}": one for one in (corpus / "tokenizer").iterdir() if one.is_file()}
    Store(s3, "x").begin_upload(files).result()
    assert len(load_tokenizer(f"{s3}/model")) == len(load_tokenizer(str(corpus / "tokenizer")))
    assert not [*(tmp_path / "cache").rglob("manifest.json")], "a tokenizer needs no training state"
    with pytest.raises(RemoteError, match=r"^tokenizer=s3://bucket/.*/none has no config.json"):
        load_tokenizer(f"{s3}/none")
