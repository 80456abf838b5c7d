"""A model's config answers for its kind, and the shapes of its layers for themselves: costs, parameters, adapters."""

import ast
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_ds.hf.config import read_model
from megatron_ds.layers.adapter_layers import AdaptableWeight
from megatron_ds.layers.mlp import MLP, MLPShape
from megatron_ds.layers.param_spec import AxisSplit, over_experts, spec_of
from megatron_ds.models.block import Block
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.feed_forward import build_feed_forward
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import SequentialModel
from tests.parity.reference import ALL_CONFIGS

PACKAGE = Path(__file__).parents[2] / "megatron_ds"
CASES: dict[str, dict[str, Any]] = ALL_CONFIGS
KINDS = ("DecoderConfig", "EncoderConfig", "EncoderDecoderConfig")


def matrices(layer: nn.Module, share: Fraction) -> float:
    """Elements of the weights of a layer's projections that a position uses; `share`: of the experts."""
    weights = [layer.get_parameter(name) for name in projections(layer)]
    return float(sum(weight.numel() * (share if spec_of(weight).is_of_experts else 1) for weight in weights))


def projections(layer: nn.Module) -> set[str]:
    """Names of the weights of projections: neither norms nor biases, learned ones by distance among them."""
    found = {name for name, weight in layer.named_parameters() if weight.dim() > 1}
    return {name for name in found if not any(part in name for part in ("bias", "relative", "norm"))}


@pytest.mark.parametrize("case", CASES)
def test_costs_and_parameters_are_those_of_the_built_block(case: str) -> None:
    core = read_model(CASES[case]).core
    specs = {spec.name: spec for spec in core.build_layers()}
    for prefix, stack in core.stacks.items():
        block = specs[f"{prefix}.0"].build()
        assert isinstance(block, Block)
        assert specs[f"{prefix}.0"].cost == stack.block_cost(0) == matrices(block, core.expert_share)
        shapes = stack.sublayers(0)
        assert shapes["mlp"].num_params == sum(weight.numel() for weight in block.mlp.parameters())  # type: ignore[union-attr]
        for name, shape in shapes.items():
            layer = block.get_submodule(name)
            assert shape.cost == matrices(layer, core.expert_share)
            assert {weight.name for weight in shape.adaptable_weights} == projections(layer)
            for weight in shape.adaptable_weights:
                assert spec_of(layer.get_parameter(weight.name)).splits == splits(weight, layer)


def splits(weight: AdaptableWeight, layer: nn.Module) -> tuple[AxisSplit, ...]:
    """The last output dim or the inputs are divided over tensor, experts over their ranks, and their router not."""
    if weight.outputs in (("router",), ("shared_gate",)):
        return ()
    if weight.module == "experts":
        return over_experts()
    spec = spec_of(layer.get_parameter(weight.name))
    dim = len(spec.shape) - (2 if weight.is_column else 1)
    return (AxisSplit(dim, "tensor", spec.splits[0].units),)


RATES = {"attention_dropout": 0.1, "residual_dropout": 0.2, "ffn_dropout": 0.3, "attention_out_dropout": 0.5}


@pytest.mark.parametrize("case", ["gpt2", "bert-pretraining", "t5-gated"])
def test_without_dropout_every_rate_is_0_and_all_else_stays(case: str) -> None:
    core = read_model(CASES[case]).core
    stacks = {prefix.rpartition(".")[0]: replace(stack, **RATES) for prefix, stack in core.stacks.items()}
    core = replace(core, embedding_dropout=0.4, **(RATES if "" in stacks else stacks))  # type: ignore[call-arg]
    still = core.without_dropout()
    before, after = leaves(asdict(core)), leaves(asdict(still))
    rates = {name for name in before if name.endswith("dropout")}
    assert len(rates) == 1 + 4 * len(stacks) and all(before[name] > 0.0 for name in rates)
    assert after == {**before, **dict.fromkeys(rates, 0.0)} and type(still) is type(core)


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_only_the_config_classes_know_the_kinds_of_models() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("isinstance", "type")
            ):
                found += [path.name for name in ast.walk(node) if isinstance(name, ast.Name) and name.id in KINDS]
    assert not found


# ---- another feed-forward layer, and another in each block ---------------------------------------------------------


@dataclass(frozen=True)
class ExpertsShape(MLPShape):
    """As many MLPs, of which a position uses one."""

    num_experts: int = 2

    @property
    def num_params(self) -> int:
        return self.num_experts * super().num_params

    @property
    def active_params(self) -> int:
        return super().num_params

    @property
    def adaptable_weights(self) -> tuple[AdaptableWeight, ...]:
        return ()


class FirstExpert(nn.Module):
    """Holds all experts, and always uses the first."""

    def __init__(self, shape: ExpertsShape, ctx: BuildContext) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLP(shape, ctx.tp, ctx.rng, ctx.kernels) for _ in range(shape.num_experts))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.experts[0](x)


@build_feed_forward.register
def build_experts(shape: ExpertsShape, ctx: BuildContext) -> nn.Module:
    return FirstExpert(shape, ctx)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(DecoderConfig):
    """A decoder whose blocks but the first have experts, of half the width."""

    def feed_forward(self, layer: int) -> MLPShape:
        dense = super().feed_forward(layer)
        if layer == 0:
            return dense
        options = {field.name: getattr(dense, field.name) for field in fields(dense)}
        return ExpertsShape(**{**options, "ffn_size": dense.ffn_size // 2}, num_experts=4)


@pytest.fixture
def experts() -> ExpertsConfig:
    plain = read_model(CASES["llama"]).core
    assert isinstance(plain, DecoderConfig)
    return ExpertsConfig(**{field.name: getattr(plain, field.name) for field in fields(plain)})


def test_each_block_has_the_feed_forward_layer_of_its_shape(experts: ExpertsConfig) -> None:
    model = SequentialModel(experts.build_layers())
    assert [type(model.get_submodule(f"blocks.{layer}.mlp")) for layer in range(2)] == [MLP, FirstExpert]
    assert len(model.get_submodule("blocks.1.mlp").experts) == 4  # type: ignore[arg-type]
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    assert model({"input_ids": ids})["logits"].shape == (1, 4, experts.vocab_size)  # type: ignore[call-overload]


def test_costs_flops_and_adapters_follow_the_shape(experts: ExpertsConfig) -> None:
    costs = {spec.name: spec.cost for spec in experts.build_layers()}
    attention = experts.attention(0).cost
    dense, one_expert = experts.feed_forward(0), experts.feed_forward(1)
    assert costs["blocks.0"] == attention + dense.cost and costs["blocks.1"] == attention + dense.cost // 2
    unused = (experts.num_layers - 1) * 3 * one_expert.active_params
    tables = 0 if experts.tied else experts.vocab_size * experts.embedding_size
    assert experts.num_idle_params == tables + unused
    weights = [weight.name for shape in experts.sublayers(1).values() for weight in shape.adaptable_weights]
    assert weights == ["qkv.q_weight", "qkv.kv_weight", "out.weight"]


def test_a_shape_without_a_builder_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^no feed-forward layer is registered for dict$"):
        build_feed_forward({}, BuildContext())


def test_a_kind_must_answer_everything() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Silent(ModelConfig):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent(family="silent", vocab_size=8, tied=False)  # type: ignore[abstract]
