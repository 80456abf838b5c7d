"""A directory of transformers, read in shards and exported again, is the same bit by bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.config import ExportSection, ModelSection
from megatron_ds.engine import Engine
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.family import Row, fused_qkv
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import LoadedModel
from megatron_ds.runtime.export import export_live
from tests.hf.models import DTYPES, declarations, export, hashes
from tests.parallel.axes import axes_at
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.ours import Place, engine_on
from tests.ranks import run_grid


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONFIGS)
def test_bit_exact(case: str, dtype: str, tensor_size: int, saved: Path, tmp_path: Path) -> None:
    source = saved / case / dtype
    weights = HFWeights(source, read_model(source))
    export(weights, tmp_path / "out", tensor_size=tensor_size, max_shard_size="20KB" if tensor_size == 2 else "5GB")
    assert hashes(tmp_path / "out") == hashes(source)
    assert read_model(tmp_path / "out").core == read_model(source).core


def fused_llama(model: HFModel) -> HFModel:
    """The same model under a table that keeps each group's queries, key and value together in one tensor."""

    def rows(config: DecoderConfig) -> list[Row]:
        separate = [row for row in model.family.rows(config) if ".attention.qkv." not in row.native]
        name = "model.layers.{n}.self_attn.qkv_proj"
        return separate + fused_qkv("blocks.{n}.attention.qkv", name, "(k [g|1|1] d)", bias=config.qkv_bias)

    return HFModel(replace(model.family, rows=rows), model.config, model.core)


@pytest.mark.parametrize("case", ["llama", "llama-uneven", "llama-tied-bias"])
def test_shards_of_fused_groups_are_those_of_separate_tensors(case: str, saved: Path, tmp_path: Path) -> None:
    """Also where a rank's query heads end within a group, and where ranks share a key head."""
    source = saved / case / "float32"
    separate = HFWeights(source, read_model(source))
    model = fused_llama(separate.model)
    to_hf = ToHF(model)
    tensors = {theirs: tensor for name in model.table for theirs, tensor in to_hf.add(name, separate.full(name))}
    assert len(tensors) == len(hashes(source)) - 2 * 4 * (2 if case == "llama-tied-bias" else 1)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    fused = HFWeights(tmp_path, model)
    for name, spec in declarations(separate).items():
        assert torch.equal(fused.full(name), separate.full(name)), name
        for size in (2, 4):
            for rank in range(size):
                ours, expected = (
                    weights.shard(name, spec, axes_at(tensor=(rank, size))) for weights in (fused, separate)
                )
                assert torch.equal(ours, expected), (name, rank, size)


def test_rank_that_holds_only_padding(tmp_path: Path, saved: Path) -> None:
    """5 words over 4 ranks: 2, 2, 1, 0."""
    source = saved / "qwen2" / "float32"
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path, read_model({**CONFIGS["qwen2"], "vocab_size": 5}))
    spec = declarations(weights)["embedding.weight"]
    shards = [weights.shard("embedding.weight", spec, axes_at(tensor=(rank, 4))) for rank in range(4)]
    assert [shard.shape for shard in shards] == [(2, 32)] * 4
    assert torch.equal(torch.cat(shards)[:5], tensors["model.embed_tokens.weight"])
    assert not torch.cat(shards)[5:].any()


def _export_from_ranks(grid: Grid, source: Path, target: Path, place: Place) -> None:
    engine, model = engine_on(grid, source, place, Recipe())
    assert isinstance(engine, Engine)
    section = ExportSection(path=str(target), max_shard_size="20KB")
    export_live(engine, LoadedModel(model, ModelSection(config={"model_type": "none"}, init="random")), section, "fp32")


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("llama", Place(2, 2, 1, 1, True)),
        ("gpt2", Place(1, 2, 1, 1)),
        ("qwen3", Place(2, 1, 2, 3)),
        ("qwen2", Place(1, 1, 1, 0)),
    ],
    ids=str,
)
def test_export_from_live_ranks(case: str, place: Place, saved: Path, tmp_path: Path) -> None:
    source = saved / case / "float32"
    run_grid(_export_from_ranks, place.layout, source, tmp_path / "out", place)
    assert hashes(tmp_path / "out") == hashes(source)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("bert-pretraining", Place(2, 2, 1, 1, True)),
        ("roberta-masked", Place(2, 1, 2, 3)),
        ("t5-tied-relu", Place(2, 2, 1, 1, True)),
        ("t5-gated", Place(1, 4, 1, 1)),
    ],
    ids=str,
)
def test_export_of_encoders_from_live_ranks(case: str, place: Place, encoders: Path, tmp_path: Path) -> None:
    """Tables and embeddings that several stages hold are written once."""
    run_grid(_export_from_ranks, place.layout, encoders / case, tmp_path / "out", place)
    assert hashes(tmp_path / "out") == hashes(encoders / case)
