"""Every form of checkpoint on disk is read alike."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.hf.config import read_model
from megatron_ds.hf.weight_files import open_directory
from megatron_ds.hf.weights import HFWeights
from tests.hf.models import build, declarations, export, hashes
from tests.parallel.axes import ALONE
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


def test_shard_that_the_index_does_not_name_is_not_read(saved: Path, tmp_path: Path) -> None:
    """As transformers: an older save may have left it. What it says that the index does too is not there twice."""
    tensors = tensors_of(saved, "llama")
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file({**other, "model.extra": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert same_as_saved(tmp_path, saved, "llama", tmp_path)


@pytest.mark.parametrize("metadata", [{"total_size": 1}, {"total_size": "much"}, {}, None])
def test_what_an_index_says_beside_the_files_is_not_believed(metadata: object, saved: Path, tmp_path: Path) -> None:
    """As transformers."""
    tensors = tensors_of(saved, "llama")
    save_file(tensors, tmp_path / "a.safetensors")
    index = {"metadata": metadata, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert same_as_saved(tmp_path, saved, "llama", tmp_path)


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The norms' tensors as they were called in TensorFlow's days."""
    old = {"weight": "gamma", "bias": "beta"}
    renamed = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        is_norm = any(word in module for word in ("ln_", "norm"))
        renamed[f"{module}.{old[part]}" if is_norm else name] = tensor
    return renamed


@pytest.mark.parametrize("bare", [False, True], ids=["prefix", "bare"])
@pytest.mark.parametrize("case", ["gpt2", "llama-tied-bias", "qwen3"])
def test_old_names_of_norms(case: str, bare: bool, saved: Path, tmp_path: Path) -> None:
    tensors, prefix = old_names(tensors_of(saved, case)), "transformer." if case == "gpt2" else "model."
    assert sum(name.endswith(".gamma") for name in tensors) >= 9
    if bare:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert same_as_saved(tmp_path, saved, case, tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_mixed_dtypes(form: str, saved: Path, tmp_path: Path) -> None:
    """Norms in fp32 beside weights in bf16, keys in fp16 beside values in bf16: nothing is rounded."""
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(saved, "llama").items()}
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].float() + 2**-20
        if "k_proj" in name:
            tensors[name] = tensors[name].half()
    if form == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path, read_model(saved / "llama" / "float32"))
    export(weights, tmp_path / "out", tensor_size=2)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        both = "k_proj" in name or "v_proj" in name  # one native parameter holds both: fp32 is what both fit into
        assert found[name].dtype == (torch.float32 if both else tensor.dtype)
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_bin_with_tensors_that_are_views_and_not_contiguous(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "qwen2")
    both = torch.cat([tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"]])
    tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"] = both.split(32)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same_as_saved(tmp_path, saved, "qwen2", tmp_path)


@pytest.mark.parametrize("change", ["compressed", "byteorder"])
def test_bin_that_cannot_be_read_where_it_lies(change: str, saved: Path, tmp_path: Path) -> None:
    """Packed anew by another tool, or written on a machine of the other byte order: read as a whole."""
    tensors, plain = tensors_of(saved, "llama"), tmp_path / "plain.bin"
    if change == "byteorder":
        swapped = {
            name: tensor.view(torch.uint8).reshape(*tensor.shape, 4).flip(-1) for name, tensor in tensors.items()
        }
        tensors = {name: tensor.contiguous().view(torch.float32).squeeze(-1) for name, tensor in swapped.items()}
    torch.save(tensors, plain)
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as made:
        for entry in given.infolist():
            content = given.read(entry)
            if change == "byteorder" and entry.filename.endswith("byteorder"):
                content = b"big"
            made.writestr(entry.filename, content, zipfile.ZIP_DEFLATED if change == "compressed" else 0)
    plain.unlink()
    assert same_as_saved(tmp_path, saved, "llama", tmp_path)


# ---- ties ------------------------------------------------------------------------------------------------------------


def test_tied_by_config_and_equal_bytes_is_tied(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "qwen2-tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][3, 4] = tensors["model.embed_tokens.weight"][3, 4] = float("nan")  # NaN != NaN
    save_file(tensors, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path, read_model(CONFIGS["qwen2-tied"]))
    assert weights.model.core.tied and "head.weight" not in declarations(weights)


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
    assert not weights.model.core.tied
    assert torch.equal(weights.shard("head.weight", declarations(weights)["head.weight"], ALONE), head)


def test_chunks_of_the_comparison_cover_the_whole_tensor(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ds.hf.weight_files._SAME_BYTES_CHUNK", 32 * 4 * 10)  # ten rows
    tensors = tensors_of(saved, "qwen2-tied")
    for row in (0, 9, 10, 129, 130):
        head = tensors["model.embed_tokens.weight"].clone()
        head[row, -1] += 1
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
        assert not HFWeights(tmp_path, read_model(CONFIGS["qwen2-tied"])).model.core.tied


def test_untied_by_config_stays_untied(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved, "llama")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert not HFWeights(tmp_path, read_model(CONFIGS["llama"])).model.core.tied
