"""For published runs the search finds a layout that is at least as fast, by the model, as the published one.

Both are planned for this package's engine, on the devices and with the batch of the row. The published layout is a
candidate among thousands, so a bound that is no bound would lose it.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import RunConfig, build_run
from megatron_ds.planner.plan_input import Machines
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.search.branch_and_bound import Limits, first_legal
from megatron_ds.planner.search.find_layouts import PlannedEstimators, SearchInput, find_layouts
from megatron_ds.planner.search.space import Candidate, Space
from megatron_ds.runtime.loaded_model import read_model_section
from megatron_ds.training.planning import plan_input
from tests.planner.published_rows import profile_of, read_rows

ROWS = {row["id"]: row for row in read_rows(Path(__file__).parents[1] / "published-runs.yaml")}
PUBLISHED = (
    "bigscience-176B-final-bloom",
    pytest.param("dgxc-llama70b-bf16-64", marks=pytest.mark.sweep),
    pytest.param("narayanan21-39.1B", marks=pytest.mark.sweep),
)


def run_of(row: dict[str, Any]) -> RunConfig:
    """The run of a row: its model, batch and precision, without a layout."""
    sizes, precision = row["model"], str(row["precision"])[:4]
    if sizes["glu"]:
        model = {
            "model_type": "llama",
            "hidden_size": sizes["hidden"],
            "intermediate_size": sizes["ffn"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["kv_heads"],
            "max_position_embeddings": sizes["seq"],
        }
    else:
        model = {
            "model_type": "gpt2",
            "n_embd": sizes["hidden"],
            "n_inner": sizes["ffn"],
            "n_layer": sizes["layers"],
            "n_head": sizes["heads"],
            "n_positions": sizes["seq"],
        }
    return build_run(
        {
            "model": {"config": {**model, "vocab_size": sizes["vocab"]}},
            "deepspeed": {precision: {"enabled": True}, "zero_optimization": {"stage": 1}},
            "data": {"format": "indexed", "train": ["tokens"], "seq_length": sizes["seq"]},
            "train": {"steps": 1, "global_batch_size": row["global_batch"]},
            "output": "out",
        }
    )


def searched(run: RunConfig, nodes: int, ranks_per_node: int, device_name: str, network: str | None) -> SearchInput:
    device, hf = find_device(device_name), read_model_section(run.model)
    machines = Machines(nodes, ranks_per_node, device.type)
    space = Space(run, hf.core.shape(), machines.world_size, ranks_per_node)
    given = plan_input(first_legal(space, hf, device.type), machines)
    return SearchInput(run, hf, given, device, find_network(network, device, ranks_per_node))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layout_at_least_as_fast_as_the_published_one(name: str) -> None:
    row = ROWS[name]
    run, profile = run_of(row), profile_of(row)
    assert profile is not None
    given = searched(run, row["gpus"] // 8, 8, profile, None)
    published = Candidate(
        row["tp"],
        row["pp"],
        row["cp"],
        None,
        bool(row["sequence_parallel"]),
        micro_batch_size=row["micro_batch"],
        recompute=row["recompute"] or "none",
    )
    limits = Limits(given.device.memory_bytes)
    (best, *_) = find_layouts(given, limits).found
    space = Space(run, given.hf.core.shape(), row["gpus"], 8)
    of_published = PlannedEstimators(given, space, Limits()).exact(published)
    print(name, best.candidate.describe(), best.estimate, "published:", published.describe(), of_published)
    assert best.estimate.step_s <= of_published.step_s
    assert best.estimate.device_bytes <= given.device.memory_bytes
