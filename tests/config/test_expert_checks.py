"""Which mixtures of experts can run on which ranks, and with which DeepSpeed JSON: each rule's text."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_ds.config import EngineConfig, ModelShape, ParallelSection, check_experts
from megatron_ds.errors import ConfigError, TopologyError

DENSE = ModelShape(num_layers=4, num_attention_heads=8, ffn_size=64, hidden_size=32, vocab_size=101, max_positions=None)
SPARSE = replace(DENSE, num_experts=8)


def check(
    shape: ModelShape = SPARSE, *, data: int = 1, zero: dict[str, Any] | None = None, tensor: int = 1, **options: Any
) -> None:
    names = ("expert",)
    parallel = ParallelSection(tensor=tensor, **{name: options.pop(name) for name in names if name in options})
    mapping = {"zero_optimization": zero} if zero is not None else {}
    check_experts(EngineConfig(parallel=parallel, **options), shape, mapping, data)


def refusal(kind: type[Exception], *given: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        check(*given, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({"expert": 2}, "parallel.expert=2"),
        ({"moe_aux_loss": 0.01}, "train.moe_aux_loss=0.01"),
        ({"moe_aux_loss": 0.0}, "train.moe_aux_loss=0"),
        ({"moe_z_loss": 0.001}, "train.moe_z_loss=0.001"),
        ({"moe_bias_rate": 0.001}, "train.moe_bias_rate=0.001"),
    ],
)
def test_settings_of_experts_need_some(options: dict[str, Any], stated: str) -> None:
    found = refusal(ConfigError, DENSE, **options)
    assert found == f"{stated} is for mixtures of experts, and this model has none; remove it"


def test_what_a_dense_model_may_state() -> None:
    check(DENSE, expert=1)
    check(DENSE, moe_z_loss=0.0, moe_bias_rate=0.0, zero={"contiguous_gradients": False})


def test_a_rate_needs_biases_to_move() -> None:
    assert refusal(ConfigError, moe_bias_rate=0.001) == (
        "train.moe_bias_rate=0.001 moves biases of the choice of experts, and this model's routers have none; "
        "remove it, or try train.moe_aux_loss"
    )
    check(replace(SPARSE, has_choice_bias=True), moe_bias_rate=0.001)


def test_expert_ranks_divide_the_experts() -> None:
    assert refusal(TopologyError, expert=3, data=12) == (
        "parallel.expert=3 does not divide the model's 8 experts; nearest: parallel.expert=2 or 4"
    )
    assert refusal(TopologyError, expert=16, data=16) == (
        "parallel.expert=16 does not divide the model's 8 experts; nearest: parallel.expert=8"
    )


def test_more_tensor_ranks_than_experts() -> None:
    few = replace(SPARSE, num_experts=4)
    assert refusal(TopologyError, few, tensor=8) == (
        "parallel.tensor=8, which divides experts too, does not divide the model's 4 experts; "
        "nearest: parallel.expert=4"
    )
    check(few, tensor=8, expert=4)


def test_expert_ranks_divide_the_ranks_of_a_stage() -> None:
    assert refusal(TopologyError, tensor=2, data=3, expert=4) == (
        "parallel.expert=4 does not divide the 6 ranks of a pipeline stage (parallel.tensor=2 * 3 data ranks); "
        "nearest: parallel.expert=2"
    )
    assert refusal(TopologyError, expert=8).endswith("(parallel.tensor=1 * 1 data ranks); nearest: parallel.expert=1")


def test_proposed_expert_ranks_pass() -> None:
    refused = 0
    for experts, tensor, data, expert in itertools.product((4, 6, 8), (1, 2, 4), (1, 2, 3), range(1, 13)):
        shape = replace(SPARSE, num_experts=experts)
        if experts % expert == 0 and tensor * data % expert == 0:
            check(shape, tensor=tensor, data=data, expert=expert)
            continue
        message = refusal(TopologyError, shape, tensor=tensor, data=data, expert=expert)
        proposed = re.search(r"nearest: parallel\.expert=(\d+)(?: or (\d+))?$", message)
        assert proposed is not None, message
        for value in filter(None, proposed.groups()):
            check(shape, tensor=tensor, data=data, expert=int(value))
        refused += 1
    assert refused > 100


@pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
def test_keys_with_which_deepspeed_sums_different_experts(key: str) -> None:
    assert refusal(ConfigError, zero={"stage": 1, key: False}, data=2, expert=2) == (
        f"zero_optimization.{key}=false in the DeepSpeed JSON cannot run with parallel.expert=2 and parallel.tensor=1: "
        "DeepSpeed then reduces gradients of experts over the wrong ranks; remove it, or try parallel.expert=1"
    )
    for options in ({"tensor": 2, "expert": 2}, {"tensor": 2}, {"expert": 1}):
        check(zero={"stage": 1, key: False}, data=2, **options)  # the experts are on the tensor axis
    check(zero={"stage": 1, key: True}, data=2, expert=2)
    assert refusal(ConfigError, zero={key: False}, tensor=2, expert=1).endswith("or try parallel.expert=2")
