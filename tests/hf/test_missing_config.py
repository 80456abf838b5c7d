"""A path that is no Hugging Face directory: what it is instead, and one that would work."""

import json
import os
from pathlib import Path

import pytest

from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import read_json, read_model
from megatron_ds.hf.peft.config import AdapterConfig
from megatron_ds.runtime.loaded_model import load_model


def model_in(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def adapter_in(directory: Path, content: object) -> None:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(content))


def message(path: str, key: str = "model.path") -> str:
    with pytest.raises(ConversionError) as caught:
        read_model(path, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("google/mt5-small", "google/mt5-small"),
        ("xlm-roberta-base", "xlm-roberta-base"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/gpt2", "gpt2"),
        ("hf://openai-community/gpt2", "openai-community/gpt2"),
    ],
)
def test_the_name_of_a_model_on_the_hub(path: str, name: str) -> None:
    folder = name.rpartition("/")[2]
    assert message(path).endswith(
        f" does not exist here, and nothing is downloaded by itself; if it is a model of the hub, try `hf download "
        f"{name} --local-dir {folder}` and model.path={folder}"
    )


def test_a_path_that_does_not_exist(place: Path) -> None:
    model_in(place / "models" / "llama-1b")
    assert message("models/lama-1b") == "model.path=models/lama-1b does not exist; nearest: model.path=models/llama-1b"
    assert message("models/lama-1b", "") == "models/lama-1b does not exist; nearest: models/llama-1b"
    absent = place / "models" / "other" / "hf"
    assert message(str(absent)) == f"model.path={absent} does not exist; there is no other in {place / 'models'}"
    (place / "link").symlink_to("gone")
    assert message("link") == "model.path=link is a link to gone, which does not exist"


@pytest.mark.parametrize("address", ["s3://bucket/llama", "gs://bucket/a/b", "https://example.org/llama"])
def test_addresses_are_not_taken_for_directories(place: Path, address: str) -> None:
    assert message(address).endswith(
        " is not on this machine, and nothing is downloaded by itself; copy the directory here first"
    )


def test_files(place: Path) -> None:
    run = model_in(place / "run")
    for name in ("config.json", "model.safetensors"):
        (run / name).touch()
        assert message(f"run/{name}") == (
            f"model.path=run/{name} is a file, and a Hugging Face directory is needed; try model.path=run"
        )
    (place / "llama.Q4.gguf").touch()
    assert "the file's format is GGUF, for inference; try the Hugging Face directory" in message("llama.Q4.gguf")
    (place / "notes.txt").touch()
    assert message("notes.txt") == "model.path=notes.txt is a file, and a Hugging Face directory is needed"


def test_the_file_latest(place: Path) -> None:
    model_in(place / "checkpoints" / "step_00000004")
    latest = place / "checkpoints" / "latest"
    latest.write_text("step_00000004\n")
    assert message("checkpoints/latest").endswith(
        "it names the newest checkpoint of checkpoints; try model.path=checkpoints/step_00000004"
    )
    latest.write_text("step_00000009\n")
    assert message("checkpoints/latest").endswith(
        "it names the newest checkpoint of checkpoints, which was 'step_00000009' and is not there"
    )


def test_folders_of_directories(place: Path) -> None:
    model_in(place / "run" / "checkpoints" / "step_00000002")
    model_in(place / "run" / "checkpoints" / "step_00000010")
    newest = "run/checkpoints/step_00000010"
    for folder in ("run", "run/checkpoints"):
        assert message(folder) == f"model.path={folder}: no config.json here; nearest: model.path={newest}"
    model_in(place / "models--org--name" / "snapshots" / "0123abcd")
    assert message("models--org--name").endswith("nearest: model.path=models--org--name/snapshots/0123abcd")


def test_a_file_that_cannot_be_read(place: Path) -> None:
    (place / "odd" / "config.json").mkdir(parents=True)
    assert message("odd").startswith("odd/config.json cannot be read: Is a directory; try")


def test_other_contents(place: Path) -> None:
    (place / "empty").mkdir()
    assert message("empty") == "model.path=empty: no config.json here; the directory is empty"
    for name, kind in {
        "mp_rank_00": "Megatron's",
        "q4.gguf": "GGUF",
        "m.nemo": "NeMo's",
        "global_step9": "DeepSp",
    }.items():
        folder = place / f"of-{name}"
        folder.mkdir()
        (folder / name).touch()
        assert f"no config.json here; its files' format is {kind}" in message(folder.name)
    (place / "text").mkdir()
    (place / "text" / "notes.txt").touch()
    assert message("text") == "model.path=text: no config.json here; is it a Hugging Face directory?"


def test_adapters(place: Path) -> None:
    adapter_in(place / "lora", {"base_model_name_or_path": "base"})
    adapter_in(place / "broken", [])
    assert message("lora").endswith("no config.json here; it holds adapters; try model.path=base and peft=lora")
    assert message("broken").endswith("try the base model's directory as model.path and peft=broken")
    with pytest.raises(ConfigError, match=r"model\.path=lora is an adapter; try model.path=base and peft=lora"):
        load_model("lora")
    with pytest.raises(ConversionError, match=r"lora: no other\.json here"):
        read_json(place / "lora" / "other.json")


def test_a_run_file_names_its_key() -> None:
    with pytest.raises(ConversionError, match=r"^model\.path=nothing/here does not exist"):
        load_model(os.path.join("nothing", "here"))


def test_a_directory_without_adapters(place: Path) -> None:
    model_in(place / "model")
    (place / "empty").mkdir()
    (place / "other").mkdir()
    (place / "other" / "notes").touch()
    (place / "link").symlink_to("gone")
    for path, expected in (
        ("model", "no adapter_config.json here; it holds a full model"),
        ("empty", "no adapter_config.json here; the directory is empty"),
        ("other", "no adapter_config.json here; is it a directory that peft wrote?"),
        ("link", "is a link to gone, which does not exist"),
        ("loras/mine", "nothing is downloaded by itself; if it is a model of the hub, try `hf download loras/mine"),
        (str(place / "none"), f"does not exist; there is no none in {place}"),
    ):
        with pytest.raises(ConversionError) as refused:
            AdapterConfig(path)
        assert str(refused.value).startswith(f"peft={path}")
        assert expected in str(refused.value)
