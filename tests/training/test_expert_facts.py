"""Parameters, FLOPs and the layout of a mixture of experts, as a run states them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ds.config import EngineConfig, ParallelSection, RunConfig
from megatron_ds.data import Dataset
from megatron_ds.engine.pipeline.partition import partition
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.parallel.grid import Layout
from megatron_ds.training.datasets import open_split
from megatron_ds.training.resolve import ResolvedRun, resolve_run
from megatron_ds.training.summary import describe_experts, flops_per_position, num_active_params
from tests.ranks import run_alone
from tests.training.tiny import MODEL

SIZES = {key: MODEL[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")}
MIXTRAL = {"model_type": "mixtral", **SIZES, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
GLM = {
    "model_type": "glm4_moe",
    **SIZES,
    "head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def count(config: dict[str, Any]) -> tuple[int, int, int]:
    """All parameters of transformers' model, those of experts that a token does not choose, those of its embedding."""
    kept = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(kept)
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    number = config.get("n_routed_experts", config.get("num_local_experts", 0))
    idle = of_experts * (number - kept.num_experts_per_tok) // number
    return sum(p.numel() for p in model.parameters()), idle, model.get_input_embeddings().weight.numel()


@pytest.fixture(params=[MIXTRAL, GLM], ids=["mixtral", "glm4_moe"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def resolved_run(
    make_run: Callable[..., RunConfig], config: dict[str, Any], **train: Any
) -> tuple[ResolvedRun, Dataset]:
    resolved = resolve_run(make_run(model={"config": config}, train=train), 1, "cpu")
    return resolved, open_split(resolved, "train")


def test_flops_count_the_experts_that_a_token_chooses(make_run: Callable[..., RunConfig], config: Any) -> None:
    """The bias of the choice is a buffer of transformers, so it is not among the parameters."""
    total, idle, embedding = count(config)
    resolved, data = resolved_run(make_run, config)
    assert sum(shape_params(resolved)) == total
    assert num_active_params(resolved, total) == total - idle
    layers, seq = config["num_hidden_layers"], 32
    attention = 12 * layers * 32 * seq
    assert flops_per_position(resolved, total, data) == 6 * (total - idle - embedding) + attention


@pytest.mark.parametrize(
    ("patterns", "is_frozen"),
    [(["*.experts.*"], lambda name: ".experts." in name), (["model.embed_tokens.*"], lambda name: "embed" in name)],
    ids=["experts", "embedding"],
)
def test_of_frozen_experts_those_that_run_save_flops(
    make_run: Callable[..., RunConfig], patterns: list[str], is_frozen: Callable[[str], bool]
) -> None:
    total, _, _ = count(MIXTRAL)
    (free, data), (frozen, _) = (resolved_run(make_run, MIXTRAL, freeze=one) for one in ([], patterns))
    saved = flops_per_position(free, total, data) - flops_per_position(frozen, total, data)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL))
    elements = sum(p.numel() for name, p in model.named_parameters() if is_frozen(name))
    assert saved == (2 * elements / 2 if patterns == ["*.experts.*"] else 0), "2 of 4 experts, at 2 FLOPs each"


def test_of_adapters_of_experts_those_that_run_count(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_alone(save_base, tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    run = make_run(model={"path": str(tmp_path / "base"), "config": None}, peft={"r": 2, "lora_alpha": 4, **targets})
    resolved = resolve_run(run, 1, "cpu")
    total, idle, _ = count(MIXTRAL)
    attention = 2 * 2 * (32 + 32)  # layers, rank, inputs and outputs
    experts = 2 * 4 * 2 * (24 + 32)  # layers, experts, rank, inputs and outputs
    active = num_active_params(resolved, total + attention + experts)
    assert active == total - idle + attention + experts // 2


def save_base(directory: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL)).save_pretrained(directory)


def shape_params(resolved: ResolvedRun) -> list[int]:
    """Elements of each parameter of the model that is trained."""
    model = SequentialModel(resolved.hf.core.build_layers())
    return [parameter.numel() for parameter in model.parameters()]


def test_the_layout_of_experts(make_run: Callable[..., RunConfig]) -> None:
    mixtral, glm = (resolved_run(make_run, one)[0].hf.core for one in (MIXTRAL, GLM))
    dense = resolved_run(make_run, MODEL)[0].hf.core
    plain, balanced = EngineConfig(), EngineConfig(moe_aux_loss=0.01, moe_bias_rate=1e-3)
    assert describe_experts(dense, plain, 1, Layout()) == ""
    alone = describe_experts(mixtral, plain, 1, Layout(pipeline=2))
    assert alone == "4 in each of 2 layers, 2 per token; balance: none"
    assert describe_experts(glm, balanced, 4, Layout(tensor=2, pipeline=2, data=4)) == (
        "8 in 2 of 3 layers, 2 per token; ep 4: 2 per rank, 2 copies; balance: aux loss 0.01, bias rate 0.001"
    )
    divided = describe_experts(mixtral, plain, 2, Layout(tensor=2))
    assert divided == "4 in each of 2 layers, 2 per token; ep 2: 2 per rank; balance: none"


def test_expert_ranks_take_data_ranks_where_tensor_ranks_are_too_few(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(model={"config": MIXTRAL}, parallel={"tensor": 1, "pipeline": 2, "expert": 4})
    assert run.parallel.least_ranks == 8 and ParallelSection(tensor=2, expert=4).least_ranks == 4
    assert ParallelSection(tensor=4, expert=2).least_ranks == ParallelSection(tensor=4).least_ranks == 4
    assert resolve_run(run, run.parallel.least_ranks, "cpu").plan.layout.data == 4, "as inspect RUN.yaml resolves it"


def test_stages_are_balanced_by_the_experts_that_run(make_run: Callable[..., RunConfig]) -> None:
    """A layer of 64 experts of which 2 run costs as much as a dense one of their width, not 32 times as much."""
    wide = {**GLM, "intermediate_size": 48, "n_routed_experts": 64, "num_hidden_layers": 8, "first_k_dense_replace": 4}
    core = resolved_run(make_run, wide)[0].hf.core
    specs = replace(core, vocab_size=1).build_layers(BuildContext())
    blocks = [spec for spec in specs if spec.name.startswith("blocks.")]
    router = core.hidden_size * 64
    assert [spec.cost - blocks[0].cost for spec in blocks] == [0.0] * 4 + [float(router)] * 4
    stages = partition([replace(spec, is_block=spec in blocks) for spec in specs], 2)
    assert specs[stages[1]].name == "blocks.4", "with experts that do not run, the second stage had one block"
