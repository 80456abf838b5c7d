"""Quantised directories: FP8 in blocks and MXFP4, encoded here and by transformers' own rules, read as bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.quantised import find_quantisation
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.weight_files import open_directory
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import ParamSpec, over_experts
from megatron_ds.parallel.grid import Axis
from megatron_ds.verify.run import check_round_trip
from tests.hf.models import Tensors, hashes
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model
from tests.ranks import run_alone

BLOCK = (24, 20)  # neither divides the widths, so that the last blocks are smaller
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
GPT_OSS = {**FAMILY_CASES["gpt_oss-yarn"], "hidden_size": 64, "intermediate_size": 32}
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def encode_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8 and its scales, block by block."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    encoded = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
            scales[i, j] = weight[block].float().abs().max() / 448
            encoded[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return encoded, scales


def encode_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(E, in, out) -> blocks, exponents, and the values that they stand for."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    scaled = groups / exponents.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - VALUES).abs().argmin(-1)
    meant = VALUES[codes] * scaled.sign() * exponents.exp2().unsqueeze(-1)
    codes = codes + 8 * (scaled < 0)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8), meant.flatten(2).transpose(1, 2).bfloat16()


def quantise(directory: Path, config: dict[str, Any], method: str) -> tuple[Tensors, Tensors]:
    """Save a quantised directory; returns its tensors, and those that they stand for."""
    run_alone(lambda: make_model(config).bfloat16().save_pretrained(directory))
    plain = load_file(directory / "model.safetensors")
    stored, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in plain.items():
        stored[name] = meant[name] = tensor
        if method == "fp8" and name.endswith("_proj.weight"):
            stored[name], scale = encode_fp8(tensor)
            stored[f"{name}_scale_inv"] = scale
            factors = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
            meant[name] = (stored[name].float() * factors[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
        elif method == "mxfp4" and name.endswith("_proj") and "experts" in name:
            stored[f"{name}_blocks"], stored[f"{name}_scales"], meant[name] = encode_mxfp4(tensor)
            del stored[name]
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = FP8 if method == "fp8" else {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(fields))
    return stored, meant


CASES = {"fp8": FAMILY_CASES["qwen3_moe-dense-layer-bias"], "mxfp4": GPT_OSS}


@pytest.mark.parametrize("method", CASES)
def test_read_as_what_they_stand_for_and_written_in_bfloat16(method: str, tmp_path: Path) -> None:
    """By our own encoder; the export has no scales, is no quantised model to transformers, and predicts the same."""
    _, meant = quantise(tmp_path / "in", CASES[method], method)
    rewrite(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == meant.keys()
    assert all(torch.equal(written[name], tensor) and tensor.dtype == torch.bfloat16 for name, tensor in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    weights = HFWeights(tmp_path / "in", read_model(tmp_path / "in"))
    assert check_round_trip(weights, tmp_path / "in", tmp_path / "again").changed == []
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    ids = {"input_ids": torch.arange(24).view(2, 12)}
    found = [
        predict(load_reference(place, weights.model, torch.float32, state), weights.model, ids)["logits"]
        for place, state in ((tmp_path / "in", weights.state_dict()), (tmp_path / "out", None))
    ]
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-5)  # products sum in another order if a matrix is transposed


def test_mxfp4_is_what_transformers_decodes(tmp_path: Path) -> None:
    """Every pair of four-bit numbers with exponents from the smallest normal number on."""
    pairs = torch.arange(256, dtype=torch.uint8)
    blocks = torch.stack([pairs.roll(shift).view(16, 16) for shift in range(12)]).view(2, 6, 16, 16)
    exponents = torch.arange(2, 2 + 192, dtype=torch.uint8).view(2, 6, 16)
    save_file({"w_blocks": blocks, "w_scales": exponents}, tmp_path / "model.safetensors")
    how = find_quantisation({"quantization_config": {"quant_method": "mxfp4"}})
    assert how is not None
    source = open_directory(tmp_path).dequantised(how)
    theirs = convert_moe_packed_tensors(blocks, exponents)
    assert source.names == ["w"] and source.dtype("w") == "BF16" and source.shape("w") == (2, 512, 6)
    assert torch.equal(source.tensor("w"), theirs)
    assert torch.equal(source.tensor("w", rows=slice(1, 2)), theirs[1:])


def test_fp8_is_what_transformers_decodes() -> None:
    """Where its rule and ours meet: blocks that divide the weight."""
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    encoded, scales = encode_fp8(weight)
    theirs = Fp8Dequantize(None)._dequantize_one(encoded, scales, torch.bfloat16)
    factors = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    assert torch.equal((encoded.float() * factors).bfloat16(), theirs)


def test_a_rank_decodes_its_own_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, meant = quantise(tmp_path, GPT_OSS, "mxfp4")
    weights = HFWeights(tmp_path, read_model(tmp_path))
    decoded: list[int] = []
    real = torch.Tensor.index_select

    def counted(self: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        decoded.append(len(index))
        return real(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counted)
    spec = ParamSpec((4, 2, 32, 64), over_experts())
    shard = weights.shard("blocks.1.mlp.experts.up_weight", spec, {"expert": Axis(4, 2)})
    theirs = meant["model.layers.1.mlp.experts.gate_up_proj"][2].t()
    assert torch.equal(shard[0], torch.stack([theirs[0::2], theirs[1::2]]))
    assert decoded == [32 * 64]  # bytes of one expert, once for its gates and ups


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method='awq': quantised weights are not supported; "),
        ({"fmt": "e5m2"}, "quantization_config.fmt='e5m2' is not supported; supported: 'e4m3'"),
        ({"weight_block_size": None}, "quantization_config.weight_block_size=None is not supported; supported: two "),
        ({"weight_block_size": [128]}, "quantization_config.weight_block_size=[128] is not supported; supported: two "),
    ],
)
def test_other_quantisations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=r"^model\.config: ") as caught:
        read_model({**CASES["fp8"], "quantization_config": {**FP8, **changes}})
    assert str(caught.value).startswith(f"model.config: {message}")


def test_scales_that_do_not_fit_or_are_missing(tmp_path: Path) -> None:
    stored, _ = quantise(tmp_path, CASES["fp8"], "fp8")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    for change, message in (
        ({f"{name}_scale_inv": torch.ones(1, 1)}, f"{name}_scale_inv has shape [1, 1]; its weight and the config need"),
        ({f"{name}_scale_inv": None}, f"{name} is of type F8_E4M3; supported: F64, F32, F16, BF16"),
    ):
        tensors = {key: tensor for key, tensor in {**stored, **change}.items() if tensor is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ConversionError) as caught:
            HFWeights(tmp_path, read_model(tmp_path))
        assert message in str(caught.value)
