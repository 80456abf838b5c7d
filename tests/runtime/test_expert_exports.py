"""Exports of mixtures of experts: every tensor is the same at every layout, from random weights and from given ones.

There are 12 experts: in the order of their names, 10 would come before 2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.checkpoint.convert import export_hf, import_hf
from megatron_ds.checkpoint.weights import gather_weights, plan_files
from megatron_ds.engine import gathering
from megatron_ds.hf.config import read_model
from megatron_ds.hf.weights import HFWeights
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.hf.models import hashes
from tests.made_once import MakeOnce
from tests.parity.cases import Recipe
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.ours import Place, engine_config, session_of
from tests.parity.reference import make_model
from tests.ranks import run_grid

CASES = {
    "mixtral": {**FAMILY_CASES["mixtral-four-experts"], "num_local_experts": 12},
    "glm4_moe": {**FAMILY_CASES["glm4_moe-dense-first"], "n_routed_experts": 12},
    "gpt_oss": {**FAMILY_CASES["gpt_oss-yarn"], "num_local_experts": 12},
    "granitemoe": {**FAMILY_CASES["granitemoe-multipliers-tied"], "num_local_experts": 12},
}
PLACES = (
    Place(1, 1, 1, 1, expert=1),
    Place(2, 1, 1, 1, expert=1),
    Place(2, 1, 2, 3, True, expert=4),
    Place(1, 2, 2, 1, expert=2),
    Place(2, 2, 1, 1, True),
)


def _save_models(directory: Path) -> None:
    """Every case as transformers saves it, with biases of the choice that are not 0."""
    for name, config in CASES.items():
        model = make_model(config)
        for _, buffer in model.named_buffers():
            if buffer.shape == (12,):
                buffer.copy_(torch.randn(12))
        model.save_pretrained(directory / name)


@pytest.fixture(scope="module")
def models(once: MakeOnce) -> Path:
    return once(_save_models)[0]


def _export(grid: Grid, sources: Mapping[str, Any], place: Place, target: Path) -> None:
    for name, source in sources.items():
        made = session_of(grid).build_engine(load_model(source), engine_config(place, Recipe()))
        made.export_hf(target / name, max_shard_size="20KB")


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_export_is_the_source_at_every_layout(place: Place, models: Path, tmp_path: Path) -> None:
    sources = {name: models / name for name in CASES}
    run_grid(_export, place.layout, sources, place, tmp_path)
    for name, source in sources.items():
        assert hashes(tmp_path / name) == hashes(source), name


@pytest.mark.parametrize("case", ["mixtral", "glm4_moe", "gpt_oss"])
def test_an_import_is_exported_as_it_was(case: str, models: Path, tmp_path: Path) -> None:
    import_hf(models / case, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf", max_shard_size="20KB")
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "checkpoint") == hashes(models / case)


def test_random_weights_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    """Experts are alike in distribution only."""
    for place in PLACES:
        run_grid(_export, place.layout, {"m": CASES["glm4_moe"]}, place, tmp_path / str(place))
    found = [hashes(tmp_path / str(place) / "m") for place in PLACES]
    assert all(one == found[0] for one in found)
    experts = [found[0][f"model.layers.1.mlp.experts.{index}.up_proj.weight"] for index in range(12)]
    assert len(set(experts)) == 12


def _gather(grid: Grid, source: Path, place: Place) -> None:
    """Gather everything for a checkpoint, and for an export, and see what ranks send each other."""
    made = session_of(grid).build_engine(load_model(source), engine_config(place, Recipe()))
    engine, model, weights = made.engine, made.model.hf, HFWeights(source, read_model(source))
    sent, whole, exchange, gather = list[torch.Size](), list[Any](), gathering.exchange_rows, gathering.gather_shard

    def exchanged(*given: Any) -> torch.Tensor:
        found = exchange(*given)
        sent.append(found.shape)
        return found

    def gathered(shard: torch.Tensor, spec: Any, *rest: Any) -> torch.Tensor | None:
        whole.extend([spec] if spec.is_of_experts else [])
        return gather(shard, spec, *rest)

    gathering.exchange_rows, gathering.gather_shard = exchanged, gathered
    files = plan_files(model, engine.inventory(), grid.layout, max_file_bytes=20_000, min_rank_bytes=1)
    assert max(file.bytes for file in files if len(file.headers) > 1) <= 20_000
    assert {file.rank for file in files} == set(range(grid.layout.world_size))
    written = {name: tensor.clone() for _, name, tensor in gather_weights(engine, model, files)}
    assert set(written) == {header.name for file in files if file.rank == grid.rank for header in file.headers}
    assert all(torch.equal(tensor, weights.tensor(name)) for name, tensor in written.items())
    for name, expert, full in engine.full_parts([name for name, row in model.table.items() if len(row.parts) > 1]):
        shape = model.table[name].of(expert).op.native_shape(model.axis_sizes)
        assert (full is not None) == (grid.rank == 0) and (full is None or full.shape == shape)
    assert not whole and {shape[0] for shape in sent} <= {0, 1} and len(sent) > 12


@pytest.mark.parametrize("place", [PLACES[2], PLACES[3]], ids=str)
def test_no_rank_gathers_more_than_one_expert(place: Place, models: Path) -> None:
    """Files stay below their limit, which all experts of a layer exceed."""
    run_grid(_gather, place.layout, models / "glm4_moe", place)
