"""A directory of transformers, read in shares and exported again, is the same bit by bit; each rank reads its part."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.config import ExportSection
from megatron_ds.engine import Engine
from megatron_ds.hf.config import read_model
from megatron_ds.hf.io import TensorSource
from megatron_ds.hf.weights import HFWeights
from megatron_ds.parallel.grid import Grid
from megatron_ds.train.export import export_live
from tests.hf.models import DTYPES, declarations, export, hashes
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
    assert read_model(tmp_path / "out").decoder == read_model(source).decoder


@pytest.mark.parametrize("case", CONFIGS)
def test_rank_reads_its_share_only(case: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved / case / "float32"
    weights = HFWeights(source, read_model(source))
    specs = declarations(weights)
    read = [0]
    original = TensorSource.read

    def counting(self: TensorSource, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        part = original(self, name, slices)
        read[0] += part.numel()
        return part

    monkeypatch.setattr(TensorSource, "read", counting)
    for size in (2, 4):
        for rank in range(size):
            for name, spec in specs.items():
                read[0] = 0
                weights.share(name, spec, rank, size)
                start, stop = spec.local_range(rank, size)
                split = spec.split_dim
                expected = spec.numel if split is None else spec.numel // spec.shape[split] * (stop - start)
                assert read[0] == expected, (name, rank, size)


def test_rank_that_holds_only_padding(tmp_path: Path, saved: Path) -> None:
    """5 words over 4 ranks: 2, 2, 1, 0."""
    from safetensors.torch import load_file, save_file

    source = saved / "qwen2" / "float32"
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    weights = HFWeights(tmp_path, read_model({**CONFIGS["qwen2"], "vocab_size": 5}))
    spec = declarations(weights)["embedding.weight"]
    shares = [weights.share("embedding.weight", spec, rank, 4) for rank in range(4)]
    assert [share.shape for share in shares] == [(2, 32)] * 4
    assert torch.equal(torch.cat(shares)[:5], tensors["model.embed_tokens.weight"])
    assert not torch.cat(shares)[5:].any()


def _export_from_ranks(grid: Grid, source: Path, target: Path, place: Place) -> None:
    engine, model = engine_on(grid, source, place, Recipe())
    assert isinstance(engine, Engine)
    export_live(engine, _JobOf(model), ExportSection(path=str(target), max_shard_size="20KB"))


class _JobOf:
    """The parts of a job that an export reads."""

    class run:
        class model:
            path = tokenizer_path = None

    def __init__(self, model: Any) -> None:
        self.model = model


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
