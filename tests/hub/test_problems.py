"""What cannot be read from the hub is one line: the id, the reason, and what to do."""

import os
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from megatron_ds import load_model
from megatron_ds.errors import ConversionError, HubError
from megatron_ds.hub import hub_id, parse_id
from megatron_ds.parallel.consensus import run_long_on_all_ranks
from tests.hub.local_hub import LocalHub, go_offline
from tests.hub.models import FIRST, SECOND, write_model
from tests.hub.server import STRANGER
from tests.ranks import run_ranks

CONFIG = {"config.json": b"{}"}


def message(name: str) -> str:
    with pytest.raises(HubError) as refused:
        load_model(name)
    text = str(refused.value)
    assert text.startswith(f"model.path={name} ") and "\n" not in text
    return text.removeprefix(f"model.path={name} ")


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")


def test_ids_by_their_form(tmp_path: Path) -> None:
    for text in ("org/name", "org/name@v1.0", "a/b@refs/pr/3", "meta-llama/Llama-3.2-1B", "o/n@0123abc"):
        assert str(parse_id(text)) == text
    for text in (
        "name",
        "a/b/c",
        "./a/b",
        "/a/b",
        "a/b/",
        "~/a",
        "a/.b",
        "a/b@",
        "a/b--c",
        "a b/c",
        "a/b..c",
        "org/name.",
        "C:/x",
        "s3://a/b",
        "org/" + "n" * 96,
    ):
        assert parse_id(text) is None, text
    Path("out/hf").mkdir(parents=True)
    assert hub_id("out/hf") is None and hub_id("out/other") is not None
    os.symlink("nowhere", "out/link")
    assert hub_id("out/link") is None


def test_not_found_on_either_side(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    both = "does not exist here, and on the hub there is no such model, or "
    assert message("models/lama-1b") == both + "it is private: then try `hf auth login`"
    Path("models/llama-1b").mkdir(parents=True)
    assert message("models/lama-1b").endswith("`hf auth login`; nearest: models/llama-1b")
    hub.publish(CONFIG, "org/secret", private=True)
    assert message("org/secret") == both + "it is private: then try `hf auth login`"
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert message("org/secret") == both + "the account of your token may not see it"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = message("org/secret")
    assert refused.startswith("cannot be read: the hub refuses your token (") and refused.endswith(
        "try `hf auth login`"
    )


def test_gated(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(CONFIG, "org/gated", gated=True)
    ask = f"; ask for it on {hub.address}/org/gated, then try `hf auth login`"
    assert message("org/gated") == "is a model whose files need permission, and no token is set" + ask
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert (
        message("org/gated") == "is a model whose files need permission, and the account of your token has none" + ask
    )


def test_revisions(hub: LocalHub) -> None:
    hub.publish(CONFIG, "org/name")
    tree = f"{hub.address}/org/name/tree/main"
    assert message("org/name@v9") == f"is on the hub, but not its revision v9; see the branches and tags on {tree}"


def test_without_a_net(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.publish(CONFIG, "org/name")
    hub.publish(CONFIG, "org/other")
    snapshot_download("org/name")
    hub.stop()
    lacks = (
        f"and not all of it is in the cache {constants.HF_HUB_CACHE}; try `hf download org/other` where there is a net"
    )
    assert message("org/other") == f"does not exist here, the hub at {hub.address} cannot be reached, {lacks}"
    assert "config.json" in str(refused_config("org/name"))  # the cache has it: the next thing is missing
    go_offline(monkeypatch)
    assert message("org/other") == f"does not exist here, HF_HUB_OFFLINE=1 forbids to download it, {lacks}"
    assert message("org/other@v2").endswith("try `hf download org/other --revision v2` where there is a net")
    assert commit in str(refused_config("org/name"))


def refused_config(name: str) -> Exception:
    with pytest.raises(ConversionError) as refused:
        load_model(name)
    assert not isinstance(refused.value, HubError)
    return refused.value


def test_a_weight_file_that_cannot_be_fetched(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
    hub.publish(write_model(tmp_path / "model"), "org/name")
    loaded = load_model("org/name")
    assert loaded.weights is not None
    repo = hub.repo("org/name")
    repo.cut[FIRST] = 1
    repo.write()
    loaded.weights.full("embedding.weight")  # broken off once, and begun again
    assert hub.downloads().count(FIRST) == 2
    hub.stop()
    with pytest.raises(HubError) as refused:
        loaded.weights.full("head.weight")
    place = loaded.weights.directory.name
    assert str(refused.value).startswith(f"org/name@{place}: {SECOND} ")
    assert f"try `hf download org/name --revision {place}` where there is a net" in str(refused.value)


def test_ranks_wait_for_a_long_step_of_one() -> None:
    assert run_ranks(waits, 2) == ["done 0", "done 1"]


def waits(info: object) -> str:
    rank: int = info.rank  # type: ignore[attr-defined]

    def step() -> str:
        time.sleep(0.3 * rank)
        return f"done {rank}"

    return run_long_on_all_ranks(step, ask_every_s=0.05)


def test_a_cache_that_other_clients_have_filled(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers downloads files one by one, and keeps no list of those that there are."""
    model = write_model(tmp_path / "model")
    commit = hub.publish(model, "org/name")
    files = [name for name in hub.files("org/name") if name not in ("README.md", SECOND)]
    for name in files:
        hf_hub_download("org/name", name)
    go_offline(monkeypatch)
    hint = f"; try `hf download org/name --revision {commit}`"
    assert str(refused_config("org/name")).endswith(f"is in {SECOND}, which is missing{hint}")
    (hub.cache / "models--org--name" / "snapshots" / commit / "model.safetensors.index.json").unlink()
    assert str(refused_config("org/name")).endswith(f"or one of their indexes{hint}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_model("org/name")
    hub.stop()
    load_model("org/name")
