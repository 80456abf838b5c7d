"""Every form of checkpoint on disk is read alike; damaged ones and those with code in them are refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.io import open_directory
from megatron_ds.hf.weights import HFWeights
from tests.hf.models import build, declarations, export, hashes
from tests.parity.cases import CONFIGS
from tests.ranks import run_alone

INDEX = "model.safetensors.index.json"


def tensors_of(saved: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(saved / case / "float32" / "model.safetensors")


def same_as_saved(directory: Path, saved: Path, case: str, scratch: Path) -> bool:
    """Whether a directory holds what the plain one does, by our reader and back."""
    weights = HFWeights(directory, read_model(saved / case / "float32"))
    export(weights, scratch / "exported", tensor_size=2)
    return hashes(scratch / "exported") == hashes(saved / case / "float32")


def save_sharded(directory: Path, case: str) -> None:
    build(CONFIGS[case]).save_pretrained(directory, max_shard_size="40KB")


def save_base(directory: Path, case: str) -> None:
    model = build(CONFIGS[case])
    model.base_model.save_pretrained(directory)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_sharded_safetensors(case: str, saved: Path, tmp_path: Path) -> None:
    run_alone(save_sharded, tmp_path / "sharded", case)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert same_as_saved(tmp_path / "sharded", saved, case, tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_bin(case: str, zipped: bool, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors_of(saved, case), file, _use_new_zipfile_serialization=zipped)
    before = file.read_bytes()
    assert same_as_saved(tmp_path, saved, case, tmp_path)
    assert file.read_bytes() == before


def test_sharded_bin(saved: Path, tmp_path: Path) -> None:
    weight_map = {}
    for number, name in enumerate(tensors_of(saved, "qwen2")):
        weight_map[name] = f"pytorch_model-{number % 3 + 1:05d}-of-00003.bin"
    for file in set(weight_map.values()):
        held = {n: t for n, t in tensors_of(saved, "qwen2").items() if weight_map[n] == file}
        torch.save({name: torch.nn.Parameter(tensor) for name, tensor in held.items()}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_as_saved(tmp_path, saved, "qwen2", tmp_path)


@pytest.mark.parametrize("case", ["gpt2", "llama-tied-bias", "qwen2-tied", "qwen3"])
def test_base_model_without_prefix(case: str, saved: Path, tmp_path: Path) -> None:
    run_alone(save_base, tmp_path / "base", case)
    names = open_directory(tmp_path / "base").names
    assert not any(name.startswith(("transformer.", "model.")) for name in names)
    assert same_as_saved(tmp_path / "base", saved, case, tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("bare", [False, True], ids=["prefix", "bare"])
@pytest.mark.parametrize("case", ["gpt2", "qwen2-tied"])
def test_buffers_are_ignored(case: str, bare: bool, form: str, saved: Path, tmp_path: Path) -> None:
    tensors, prefix = tensors_of(saved, case), "transformer." if case == "gpt2" else "model."
    for layer in range(4):
        if case == "gpt2":
            tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
            tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            tensors[f"{prefix}layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    if bare:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if form == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    assert same_as_saved(tmp_path, saved, case, tmp_path)


def test_safetensors_before_bin_and_one_file_before_an_index(saved: Path, tmp_path: Path) -> None:
    """As transformers chooses."""
    save_file(tensors_of(saved, "llama"), tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing of the sort")
    (tmp_path / INDEX).write_text("{")
    assert same_as_saved(tmp_path, saved, "llama", tmp_path)


def test_symbolic_links_as_in_the_hub_cache(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shutil.copy(saved / "llama" / "float32" / "model.safetensors", tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    assert same_as_saved(tmp_path / "snapshot", saved, "llama", tmp_path)


# ---- ties ------------------------------------------------------------------------------------------------------------


def test_tied_by_config_and_equal_bytes_is_tied(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "qwen2-tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][3, 4] = tensors["model.embed_tokens.weight"][3, 4] = float("nan")  # NaN != NaN
    save_file(tensors, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path, read_model(CONFIGS["qwen2-tied"]))
    assert weights.model.decoder.tied and "head.weight" not in declarations(weights)


@pytest.mark.parametrize("change", ["value", "sign of zero", "dtype"])
def test_tied_by_config_and_different_bytes_is_not_tied(change: str, saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "qwen2-tied")
    tensors["model.embed_tokens.weight"][-1, -1] = 0.0
    head = tensors["model.embed_tokens.weight"].clone()
    if change == "dtype":
        head = head.bfloat16()
    else:
        head[-1, -1] = 1e-30 if change == "value" else -0.0
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path, read_model(CONFIGS["qwen2-tied"]))
    assert not weights.model.decoder.tied
    assert torch.equal(weights.share("head.weight", declarations(weights)["head.weight"], 0, 1), head)


def test_chunks_of_the_comparison_cover_the_whole_tensor(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ds.hf.io._SAME_BYTES_CHUNK", 32 * 8 * 10)  # ten rows
    tensors = tensors_of(saved, "qwen2-tied")
    for row in (0, 9, 10, 129, 130):
        head = tensors["model.embed_tokens.weight"].clone()
        head[row, -1] += 1
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
        assert not HFWeights(tmp_path, read_model(CONFIGS["qwen2-tied"])).model.decoder.tied


def test_untied_by_config_stays_untied(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "llama")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert not HFWeights(tmp_path, read_model(CONFIGS["llama"])).model.decoder.tied


# ---- refused ---------------------------------------------------------------------------------------------------------


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
