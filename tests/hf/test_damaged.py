"""What is damaged, holds code, points elsewhere, or does not add up is refused in one line, and nothing is run."""

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.weights import HFWeights
from tests.hf.test_reading import INDEX, old_names, tensors_of
from tests.parity.cases import CONFIGS


def refusal(directory: Path, case: str = "llama") -> str:
    with pytest.raises(ConversionError) as caught:
        HFWeights(directory, read_model(CONFIGS[case]))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_no_weights(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path}: no weights here; expected model.safetensors, pytorch_model.bin, or one of their indexes"
    )


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_index_that_points_outside(file: str, saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path, directory / "sub"):
        save_file(tensors_of(saved, "llama"), place / "model.safetensors")
    write_index(directory, {"model.norm.weight": file})
    assert refusal(directory) == (f"{directory / INDEX}: model.norm.weight points outside the directory, to {file!r}")


def test_index_that_names_a_missing_file(tmp_path: Path) -> None:
    write_index(tmp_path, {"model.norm.weight": "model-00001-of-00002.safetensors"})
    assert refusal(tmp_path) == (
        f"{tmp_path / INDEX}: model.norm.weight is in model-00001-of-00002.safetensors, which is missing"
    )


def test_index_that_names_a_tensor_its_file_lacks(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "llama")
    index = dict.fromkeys(tensors, "a.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    write_index(tmp_path, index)
    assert refusal(tmp_path) == (
        f"{tmp_path / INDEX}: model.norm.weight should be in a.safetensors, which does not hold it"
    )


def test_tensor_in_a_shard_that_the_index_does_not_name(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "llama")
    index = dict.fromkeys(tensors, "a.safetensors")
    save_file({**tensors, "model.extra": torch.ones(1)}, tmp_path / "a.safetensors")
    write_index(tmp_path, index)
    assert "unexpected model.extra" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[]", "has no weight_map from tensors to files"),
        ("{}", "has no weight_map from tensors to files"),
        ('{"weight_map": ["a"]}', "has no weight_map from tensors to files"),
    ],
)
def test_index_that_is_none(content: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    assert refusal(tmp_path) == f"{tmp_path / INDEX}: {rule}"


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors(kept: int, saved: Path, tmp_path: Path) -> None:
    content = (saved / "llama" / "float32" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:kept])
    assert refusal(tmp_path).startswith(f"{tmp_path / 'model.safetensors'}: damaged, or not safetensors (")


@pytest.mark.parametrize("kept", [0, 100, 2000, -1000])
def test_truncated_bin(kept: int, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors_of(saved, "llama"), file)
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(tmp_path).startswith(f"{file}: damaged, or holds more than plain tensors, which is not loaded (")


class Touch:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_code_in_a_pickle_is_refused_and_not_run(zipped: bool, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    content = {**tensors_of(saved, "llama"), "model.extra": Touch(tmp_path / "made")}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path)
    assert message.startswith(f"{file}: damaged, or holds more than plain tensors, which is not loaded (")
    assert not (tmp_path / "made").exists()
    torch.load(file, weights_only=False)  # the trap itself works
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"model": {"weight": torch.ones(1)}}, {"step": 3}])
def test_bin_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == f"{tmp_path / 'pytorch_model.bin'}: expected a mapping of names to tensors"


def test_missing_tensors(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "llama")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == (
        f"{tmp_path}: missing model.layers.2.mlp.up_proj.weight, which llama with this config needs"
    )
    tensors = {name: tensor for name, tensor in tensors.items() if ".3." not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == (
        f"{tmp_path}: missing model.layers.3.input_layernorm.weight, model.layers.3.self_attn.q_proj.weight, "
        "model.layers.3.self_attn.k_proj.weight and 7 more, which llama with this config needs"
    )


@pytest.mark.parametrize("bare", [False, True], ids=["prefix", "bare"])
def test_untied_by_config_without_a_head(bare: bool, saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "llama")
    del tensors["lm_head.weight"]
    if bare:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == (
        f"{tmp_path}: missing lm_head.weight, which llama with this config needs; set tie_word_embeddings to true in "
        "config.json if the head is the embedding"
    )


def test_unexpected_tensors(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "qwen2")
    save_file({**tensors, "model.layers.0.self_attn.o_proj.bias": torch.ones(32)}, tmp_path / "model.safetensors")
    assert refusal(tmp_path, "qwen2") == (
        f"{tmp_path}: unexpected model.layers.0.self_attn.o_proj.bias, which qwen2 with this config does not have"
    )
    # a config with fewer layers than the weights: nothing is dropped in silence
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"unexpected model\.layers\.3\..* and 9 more, which qwen2"):
        HFWeights(tmp_path, read_model({**CONFIGS["qwen2"], "num_hidden_layers": 3}))


def test_misshapen_tensor(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "gpt2")
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].t().contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path, "gpt2") == (
        f"{tmp_path}: transformer.h.1.mlp.c_fc.weight has shape [128, 32], the config says [32, 128]"
    )


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_tensor(dtype: torch.dtype, name: str, saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "gpt2")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path, "gpt2") == (
        f"{tmp_path}: transformer.wpe.weight is of type {name}; supported: F64, F32, F16, BF16 (no quantised weights)"
    )
