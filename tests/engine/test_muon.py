"""Muon on given gradients equals torch.optim.Muon bit for bit, in bf16; its options and its parameter groups."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.config import OptimizerSection
from megatron_ds.engine import state_kinds_of
from megatron_ds.engine.matrix_exchange import Holding, MatrixExchange
from megatron_ds.engine.optimizers.muon import MATRICES, GuardedMuon, MatrixUpdate, Place
from megatron_ds.engine.optimizers.newton_schulz import COEFFICIENTS, orthogonalize
from megatron_ds.engine.param_groups import param_groups
from megatron_ds.errors import ConfigError
from megatron_ds.layers.linear import QKVLinear, ReplicatedLinear
from megatron_ds.layers.param_spec import Matrices, ParamSpec, over_experts
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.tensor import TensorParallel
from tests.parallel.axes import ALONE

CPU = torch.device("cpu")
SPECS = {
    0: ParamSpec((24, 16), matrices=Matrices()),
    1: ParamSpec((2, 40, 24), matrices=Matrices()),
    2: ParamSpec((48, 20), matrices=Matrices(alternating=2, block_rows=8)),
    3: ParamSpec((3, 16, 40), over_experts(), matrices=Matrices()),
}


def apart(spec: ParamSpec, full: Tensor) -> list[Tensor]:
    """The matrices as views of a parameter or a gradient, by plain indexing."""
    assert spec.matrices is not None
    if spec.matrices.alternating == 1:
        return list(full.reshape(-1, *full.shape[-2:]).unbind())
    return [full.view(3, 2, 8, 20)[:, index].reshape(24, 20) for index in range(2)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_given_gradients_give_the_weights_of_torch(nesterov: bool, adjust: str) -> None:
    generator = torch.Generator().manual_seed(0)
    section = OptimizerSection(
        name="muon", lr=0.02, weight_decay=0.1, options={"nesterov": nesterov, "adjust_lr": adjust}
    )
    ours = [torch.randn(spec.shape, generator=generator).requires_grad_() for spec in SPECS.values()]
    theirs = [one.clone() for spec, full in zip(SPECS.values(), ours) for one in apart(spec, full.detach())]
    group = {"params": ours, "weight_decay": 0.1, MATRICES: True}
    optimizer = GuardedMuon.from_section([group], section, CPU, **section.options)
    holdings = [Holding(number, spec.full_ranges, 0, spec.numel) for number, spec in SPECS.items()]
    exchange = MatrixExchange(SPECS, [holdings], Axis(), CPU, 1000)
    optimizer.updates = {id(ours[0]): MatrixUpdate(exchange, {n: Place(p, 0, p.numel()) for n, p in enumerate(ours)})}
    expected = torch.optim.Muon(
        [torch.nn.Parameter(one) for one in theirs], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust
    )
    for parameter in ours:
        optimizer.create_state(parameter, optimizer.param_groups[0])
    for _ in range(3):
        for parameter in ours:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients = [one for spec, full in zip(SPECS.values(), ours) for one in apart(spec, full.grad)]  # type: ignore[arg-type]
        for parameter, gradient in zip(expected.param_groups[0]["params"], gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        expected.step()
    found = [one for spec, full in zip(SPECS.values(), ours) for one in apart(spec, full.detach())]
    assert all(map(torch.equal, found, expected.param_groups[0]["params"]))
    assert len(exchange.transfers) > 1, "there are several rounds"
    assert optimizer.state[ours[0]].keys() == {"step", "momentum_buffer"} and optimizer.state[ours[0]]["step"] == 3


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 16, 40)])
def test_singular_values_become_about_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, 5, COEFFICIENTS))
    assert values.min() > 0.4 and values.max() < 1.3
    assert not orthogonalize(torch.zeros(shape), 5, COEFFICIENTS).any(), "an expert without tokens is no NaN"


def test_groups_hold_matrices_or_the_rest() -> None:
    """Heads' last layers, biases and vectors are AdamW's, with its own learning rate unless a group has one."""
    tp = TensorParallel(ALONE["tensor"], False)
    module = torch.nn.ModuleDict(
        {
            "qkv": QKVLinear(8, 2, 1, 4, tp, q_std=0.1, kv_std=0.1, bias=True),
            "dense": ReplicatedLinear(8, 8, tp, std=0.1),
            "gate": ReplicatedLinear(8, 1, tp, std=0.1),
            "out": ReplicatedLinear(8, 3, tp, std=0.1, is_output=True),
        }
    )
    entry: Any = {"match": ["out"], "lr": 2e-3}
    section = OptimizerSection(name="muon", lr=1e-2, groups=[entry], options={"adamw_lr": 1e-3})
    found = {
        name: (bool(group.get(MATRICES)), round(group["lr_factor"] * 1e-2, 9))
        for group in param_groups(module, section, None, {"out.weight": 0})
        for name, parameter in module.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    matrix, rest = (True, 1e-2), (False, 1e-3)
    assert found == {
        "qkv.q_weight": matrix,
        "qkv.kv_weight": matrix,
        "qkv.q_bias": rest,
        "qkv.kv_bias": rest,
        "dense.weight": matrix,
        "gate.weight": rest,
        "out.weight": (False, 2e-3),
    }


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("momentum", 1.0, "momentum=1.0 is not a number from 0 to below 1; try 0.95"),
        ("nesterov", "yes", "nesterov=yes is not true or false"),
        ("adjust_lr", "rms", "adjust_lr=rms is not one of original, match_rms_adamw"),
        ("adamw_lr", -1, "adamw_lr=-1 is not a learning rate; try 3.0e-4"),
        ("ns_steps", 0, "ns_steps=0 is not an integer from 1 to 99; try 5"),
        ("ns_coefficients", [1, 2], "ns_coefficients=[1, 2] is not a list of a, b and c of a x + b x^3 + c x^5; try"),
        ("ns_dtype", "fp16", "ns_dtype=fp16 is not one of bf16, fp32"),
    ],
)
def test_options_are_checked(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        state_kinds_of(OptimizerSection(name="muon", options={option: value}))
    assert str(caught.value).startswith(f"optimizer.options.{message}")
