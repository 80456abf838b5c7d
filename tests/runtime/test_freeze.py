"""`train.freeze` on mixtures of experts: all experts of a layer or none, and what to write instead."""

import pytest

from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.runtime.freeze import frozen_parameters
from tests.parity.reference import ALL_CONFIGS


@pytest.fixture(scope="module")
def model() -> HFModel:
    """A model of 4 layers with 8 experts in layers 1 and 3."""
    return read_model(dict(ALL_CONFIGS["qwen2_moe-windows-dense-first"]))


@pytest.mark.parametrize(
    ("pattern", "natives"),
    [
        ("model.layers.*.mlp.experts.*", ["experts.down_weight", "experts.up_weight"]),
        ("*.mlp.experts.*.down_proj.weight", ["experts.down_weight"]),
        ("*.mlp.gate.*", ["router.weight"]),
        ("*.shared_expert.*", ["shared.down.weight", "shared.up.weight"]),
        ("*.shared_expert_gate.*", ["shared_gate.weight"]),
    ],
)
def test_experts_routers_and_shared_experts(pattern: str, natives: list[str], model: HFModel) -> None:
    wanted = {f"blocks.{layer}.mlp.{native}" for layer in (1, 3) for native in natives}
    assert frozen_parameters(model, [pattern]) == wanted


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (
            ["model.layers.1.mlp.experts.3.*"],
            "train.freeze matches only one of model.layers.1.mlp.experts.3.gate_proj.weight and "
            "model.layers.1.mlp.experts.0.gate_proj.weight, and all experts of a layer are one parameter here; "
            "nearest: model.layers.1.mlp.experts.*.gate_proj.weight and model.layers.1.mlp.experts.*.up_proj.weight",
        ),
        (
            ["*experts.*.up_proj.weight"],
            "train.freeze matches only one of model.layers.1.mlp.experts.0.up_proj.weight and "
            "model.layers.1.mlp.experts.0.gate_proj.weight, and all experts of a layer are one parameter here; "
            "nearest: model.layers.1.mlp.experts.*.gate_proj.weight and model.layers.1.mlp.experts.*.up_proj.weight",
        ),
        (
            ["*.3.mlp.experts.[1-7].down_proj.*"],
            "train.freeze matches only one of model.layers.3.mlp.experts.1.down_proj.weight and "
            "model.layers.3.mlp.experts.0.down_proj.weight, and all experts of a layer are one parameter here; "
            "nearest: model.layers.3.mlp.experts.*.down_proj.weight",
        ),
        (
            ["*k_proj.weight"],
            "train.freeze: model.layers.0.self_attn.k_proj.weight and model.layers.0.self_attn.v_proj.weight are one "
            "parameter here; freeze both or neither",
        ),
    ],
)
def test_a_part_of_a_parameter_is_refused(patterns: list[str], says: str, model: HFModel) -> None:
    with pytest.raises(ConfigError) as caught:
        frozen_parameters(model, patterns)
    assert str(caught.value) == says
    if "nearest: " in says:
        assert frozen_parameters(model, says.partition("nearest: ")[2].split(" and "))


def test_the_norm_of_one_head_is_refused() -> None:
    model = read_model(dict(ALL_CONFIGS["stablelm-parallel-normed-heads"]))
    with pytest.raises(ConfigError) as caught:
        frozen_parameters(model, ["model.layers.0.self_attn.q_layernorm.norms.3.weight"])
    assert str(caught.value) == (
        "train.freeze matches only one of model.layers.0.self_attn.q_layernorm.norms.3.weight and "
        "model.layers.0.self_attn.q_layernorm.norms.0.weight, and all heads of a layer are one parameter here; "
        "nearest: model.layers.0.self_attn.q_layernorm.norms.*.weight"
    )
