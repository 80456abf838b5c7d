"""Ids of models on the hub in run files and in commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_ds import load_model
from tests.cli.conftest import Fork
from tests.hub.local_hub import LocalHub
from tests.hub.models import FIRST, SECOND, write_model
from tests.training.tiny import run_mapping


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub_models") / "model")


def test_a_run(hub: LocalHub, model: Path, corpus: Path, tmp_path: Path, fork: Fork) -> None:
    """Its record has the commit; it resumes from its checkpoint where neither the hub nor the cache is there."""
    commit = hub.publish(model, "org/name")
    out, adapters = tmp_path / "out", tmp_path / "adapters"
    mapping = run_mapping(corpus, out) | {"model": {"path": "org/name"}, "export": {"path": str(tmp_path / "hf")}}
    mapping["checkpoint"] = {"every": 2}
    mapping["train"] |= {"steps": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    train = ("-m", "megatron_ds", "train", "run.yaml", "--nproc", "2")
    process = fork(*train)
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["model"] == {"path": f"org/name@{commit}"} | {
        key: kept["model"][key] for key in kept["model"] if key != "path"
    }
    downloads = hub.downloads()
    assert [downloads.count(name) for name in (FIRST, SECOND, "config.json", "tokenizer.json")] == [1, 1, 1, 1]
    assert (
        sum(
            "/api/models/org/name/revision/main" in one.path or one.path == "/api/models/org/name"
            for one in hub.requests
        )
        == 1
    )
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == {*all_weights(model)}
    hub.stop()
    shutil.rmtree(hub.cache)
    process = fork(*train, "train.steps=3", "export.overwrite=true")
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "the model's config and other files are read from" in output[1] and "resuming from step 2" in "".join(output)
    process = fork(*train, f"output={adapters}")
    assert "cannot be reached" in process.communicate(timeout=60)[1] and process.returncode == 2


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def test_adapters_name_their_base_by_its_id(
    hub: LocalHub, model: Path, corpus: Path, tmp_path: Path, fork: Fork
) -> None:
    commit = hub.publish(model, "org/name")
    adapters, merged = tmp_path / "adapters", tmp_path / "merged"
    mapping = run_mapping(corpus, tmp_path / "out") | {"model": {"path": "org/name"}, "export": {"path": str(adapters)}}
    mapping["peft"], mapping["checkpoint"] = {"r": 2, "target_modules": ["q_proj"]}, {"every": 2}
    mapping["train"] |= {"steps": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    process = fork("-m", "megatron_ds", "train", "run.yaml")
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", commit)
    hub.publish(adapters, "org/lora")
    other = hub.publish({"notes.txt": b"the same weights"}, "org/name")  # main is another commit now
    shutil.rmtree(adapters)
    process = fork("-m", "megatron_ds", "export", "org/lora", merged, "--merge")
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resuming from step 2" in "".join(run(fork, "train", "run.yaml", "train.steps=3", "export=null"))
    process = fork(
        "-m", "megatron_ds", "train", "run.yaml", "train.steps=4", f"model.path=org/name@{other}", "export=null"
    )
    refused = process.communicate(timeout=60)[1]
    assert f"model.path=org/name@{other} is another commit than that on which" in refused
    assert f"try model.path=org/name@{commit}, or another output" in refused
    changed = load_file(merged / "model.safetensors")
    before = all_weights(model)
    assert changed.keys() == before.keys()
    assert torch.equal(changed["lm_head.weight"], before["lm_head.weight"])
    loaded = load_model("org/name@" + commit, peft="org/lora")
    assert loaded.adapter_weights is not None and loaded.adapters is not None


def test_commands(hub: LocalHub, model: Path, tmp_path: Path, fork: Fork) -> None:
    commit = hub.publish(model, "org/name")
    out, err = run(fork, "inspect", "org/name")
    assert f"org/name@{commit}" in out and "2 files, 39 tensors" in out, (out, err)
    assert hub.downloads().count(FIRST) == 0
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    run(fork, "prepare", "text.jsonl", "--output", "corpus", "--tokenizer", "org/name")
    assert (tmp_path / "corpus.idx").is_file() and hub.downloads().count(FIRST) == 0
    run(fork, "init", "new.yaml", "--model", "org/name", "--data", "text.jsonl", "--gpus", "0")
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["model"]["path"] == "org/name"
    assert hub.downloads().count(FIRST) == 0
    run(fork, "import", "org/name", "checkpoint")
    assert all_weights(tmp_path / "checkpoint").keys() == all_weights(model).keys()
    (hub.cache / "models--org--name" / "snapshots" / commit / SECOND).unlink()
    out, err = run(fork, "verify", "org/name@main")
    assert out.splitlines()[0] == f"downloading {SECOND} of org/name, 0.0 GB"
    assert out.splitlines()[-1] == "verdict     equal to transformers: org/name@main"


def run(fork: Fork, *arguments: object) -> tuple[str, str]:
    process = fork("-m", "megatron_ds", *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    return out, err


def test_generation_and_evaluation(hub: LocalHub, model: Path, tmp_path: Path, fork: Fork) -> None:
    commit = hub.publish(model, "org/name")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 " * 20)
    of_hub = run(fork, "generate", "org/name", "--prompt", "w1 w2", "--max-new-tokens", "4", "--json")[0]
    local = run(fork, "generate", model, "--prompt", "w1 w2", "--max-new-tokens", "4", "--json")[0]
    assert json.loads(of_hub)["text"] == json.loads(local)["text"]
    evaluate = ("--data", "text.txt", "data.seq_length=16", "--json")
    run(fork, "evaluate", "org/name", *evaluate, "hub.json")
    run(fork, "evaluate", model, *evaluate, "local.json")
    reports = [json.loads((tmp_path / name).read_text()) for name in ("hub.json", "local.json")]
    assert reports[0]["weights"] == f"org/name@{commit}"
    assert reports[0] == reports[1] | {name: reports[0][name] for name in ("path", "weights")}
