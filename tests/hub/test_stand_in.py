"""The local hub answers huggingface_hub, transformers and datasets as the real one does; nothing of ours is used."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.local_hub import LocalHub, go_offline
from tests.hub.server import STRANGER, TOKEN

SMALL = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "sub/notes.txt": b"text"}


def test_a_snapshot_is_downloaded_once_and_read_without_the_net(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.publish(SMALL, "org/name")
    place = Path(snapshot_download("org/name"))
    assert place == hub.cache / "models--org--name" / "snapshots" / commit
    assert {one: (place / one).read_bytes() for one in SMALL} == SMALL
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "notes.txt"]
    assert {one.path for one in get_cached_repo_tree("org/name", revision=commit, cache_dir=hub.cache)} == set(SMALL)
    hub.forget_requests()
    assert snapshot_download("org/name", revision=commit) == str(place)
    assert hub.requests == []
    go_offline(monkeypatch)
    assert snapshot_download("org/name") == str(place)
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("org/other")
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("org/name")


def test_branches_and_commits_are_revisions(hub: LocalHub) -> None:
    first = hub.publish(SMALL, "org/name")
    second = hub.publish({"config.json": b'{"a": 1}'}, "org/name")
    assert first != second
    assert Path(hf_hub_download("org/name", "config.json")).read_bytes() == b'{"a": 1}'
    assert Path(hf_hub_download("org/name", "config.json", revision=first)).read_bytes() == b"{}"
    assert HfApi().model_info("org/name").sha == second
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("org/name", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/name", "no.json")


def test_who_may_read(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(SMALL, "org/private", private=True)
    hub.publish(SMALL, "org/gated", gated=True)
    for name, problem in {"org/private": RepositoryNotFoundError, "org/gated": GatedRepoError}.items():
        for token in (None, STRANGER):
            with pytest.raises(problem):
                snapshot_download(name, token=token)
        snapshot_download(name, token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Exception, match="Invalid credentials"):
        HfApi().model_info("org/private")


def test_a_download_that_breaks_off_is_begun_again(hub: LocalHub) -> None:
    hub.publish(SMALL, "org/name")
    repo = hub.repo("org/name")
    repo.cut["model.safetensors"] = 1
    repo.write()
    found = Path(hf_hub_download("org/name", "model.safetensors"))
    assert found.read_bytes() == SMALL["model.safetensors"]
    assert hub.downloads() == ["model.safetensors"] * 2


def test_a_folder_is_uploaded(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name, content in {**SMALL, "README.md": b"---\nlibrary_name: x\n---\n"}.items():
        (source / name).write_bytes(content)
    api = HfApi()
    api.create_repo("member/new", private=True, exist_ok=True)
    api.create_repo("member/new", private=True, exist_ok=True)
    commit = api.upload_folder(repo_id="member/new", folder_path=source)
    assert hub.repo("member/new").branches["main"] == commit.oid and hub.repo("member/new").private
    assert {name: hub.files("member/new")[name].read_bytes() for name in SMALL} == SMALL
    puts = sum(one.method == "PUT" for one in hub.requests)
    api.upload_folder(repo_id="member/new", folder_path=source)
    assert puts == 1 == sum(one.method == "PUT" for one in hub.requests)  # what is there is not sent again


def test_transformers_and_datasets_read_from_it(hub: LocalHub, tmp_path: Path) -> None:
    import datasets
    from transformers import AutoConfig

    hub.publish({"config.json": b'{"model_type": "llama", "hidden_size": 64}'}, "org/model")
    assert AutoConfig.from_pretrained("org/model").hidden_size == 64
    rows = b"".join(b'{"text": "row %d"}\n' % number for number in range(50))
    hub.publish({"data/train.jsonl": rows, "data/test.jsonl": rows}, "org/set", "datasets")
    assert len(datasets.load_dataset("org/set", split="train")) == 50
    streamed = datasets.load_dataset("org/set", split="train", streaming=True)
    assert [row["text"] for row in streamed][-1] == "row 49"
