"""Exports are uploaded to the hub: by a run and by the command, and what is refused before anything is spent."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ds.config import build_section
from megatron_ds.config.run_config import ExportSection
from megatron_ds.errors import ConfigError, HubError
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hub import HubId, prepare_push, push
from tests.cli.conftest import Fork
from tests.hub.local_hub import LocalHub, go_offline
from tests.hub.models import write_model
from tests.hub.server import STRANGER, TOKEN
from tests.training.tiny import run_mapping

NAMED = "export.push_to=member/new"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 9, "1_Pooling/config.json": b"[]", MARK: b"{}"}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(content)
    return tmp_path / "hf"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def test_a_directory_is_one_commit(hub: LocalHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    prepare_push(HubId("member/new"), NAMED, private=True)
    assert hub.repo("member/new").private and [*hub.files("member/new")] == [".gitattributes"]
    address = push(export, HubId("member/new"), NAMED, "card", {MARK})
    files = {name: file.read_bytes() for name, file in hub.files("member/new").items() if name != ".gitattributes"}
    assert files == {name: content for name, content in FILES.items() if name != MARK} | {"README.md": b"card"}
    assert address.endswith(hub.repo("member/new").branches["main"])
    assert sum("/commit/" in one.path for one in hub.requests) == 1


def test_a_second_push_leaves_no_other_weights(hub: LocalHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    former = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    hub.publish({**former, "README.md": b"by hand"}, "member/new")
    prepare_push(HubId("member/new", "v2"), NAMED, private=True)
    push(export, HubId("member/new", "v2"), NAMED, "card", {MARK})
    repo = hub.repo("member/new")
    new = {name: file.read_bytes() for name, file in repo.files(repo.branches["v2"]).items()}
    assert {*new} == {"config.json", "model.safetensors", "1_Pooling/config.json", "notes.md", "README.md"}
    assert new["README.md"] == b"by hand" and {*former} < {*repo.files(repo.branches["main"])}


def test_a_hub_that_is_busy(hub: LocalHub, export: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    prepare_push(HubId("member/new"), NAMED, private=True)
    repo = hub.repo("member/new")
    repo.failing["commit"] = 2
    repo.write()
    push(export, HubId("member/new"), NAMED, "card", {MARK})
    assert waits == [2.0, 15.0] and sum(one.method == "PUT" for one in hub.requests) == 1
    repo = hub.repo("member/new")
    repo.failing["commit"] = 9
    repo.write()
    (export / "config.json").write_text("[]")
    with pytest.raises(HubError) as refused:
        push(export, HubId("member/new"), NAMED, "card", {MARK})
    assert str(refused.value).startswith(f"{NAMED} cannot be written: the hub answers with status 503 (")
    assert str(refused.value).endswith(f"; {export} is complete: try `hf upload member/new {export} .`")


def test_what_is_refused_at_the_start(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    target = HubId("member/new")

    def refused() -> str:
        with pytest.raises(HubError) as problem:
            prepare_push(target, NAMED, private=True)
        return str(problem.value)

    assert refused() == f"{NAMED} needs a token that may write; try `hf auth login`, or set HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert refused().startswith(f"{NAMED} cannot be written with your token (")
    hub.publish(FILES, "member/new")
    assert "try `hf auth login` with one that may write there; hf upload member/new" in refused()
    hub.stop()
    assert refused().startswith(f"{NAMED} cannot be written: the hub at {hub.address} cannot be reached (")
    go_offline(monkeypatch)
    assert refused().startswith(f"{NAMED} needs a net, and HF_HUB_OFFLINE=1 forbids to use it; try `hf upload")
    for wrong in ("name", "a/b/c", 3):
        with pytest.raises(
            ConfigError, match=r"export\.push_to=.* is no repository on the hub, nor a URL; write org/name"
        ):
            build_section(ExportSection, {"path": "out", "push_to": wrong})


def test_a_run_and_the_command(
    hub: LocalHub, corpus: Path, tmp_path: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = hub.publish(write_model(tmp_path / "model"), "org/base")
    export = {"path": str(tmp_path / "hf"), "push_to": "member/tuned"}
    mapping: dict[str, Any] = run_mapping(corpus, tmp_path / "out") | {"model": {"path": "org/base"}, "export": export}
    mapping["train"] |= {"steps": 2}
    mapping["checkpoint"] = {"every": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    process = fork("-m", "megatron_ds", "train", "run.yaml")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "uploaded to the hub: " in out + err, (out, err)
    files = hub.files("member/tuned")
    local = {one.name: one.read_bytes() for one in (tmp_path / "hf").iterdir() if one.name != MARK}
    card = files.pop("README.md").read_text()
    assert {name: file.read_bytes() for name, file in files.items() if name != ".gitattributes"} == local
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == "org/base" and metadata["base_model_relation"] == "finetune"
    assert commit in card and "| steps | 2 |" in card and str(tmp_path) not in card
    process = fork("-m", "megatron_ds", "export", "out", "again", "--push-to", "member/again", "--public")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "uploaded to the hub: " in out, (out, err)
    assert not hub.repo("member/again").private
    assert json.loads(hub.files("member/again")["config.json"].read_text())["model_type"] == "llama"
