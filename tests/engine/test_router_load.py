"""What a step logs about the balance of its experts."""

import math

import pytest
import torch
from torch import nn

from megatron_ds.engine.router_load import METRICS, find_routers
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.layers.moe.shape import MoEShape, RouterShape
from megatron_ds.monitor import StepMetrics
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Layout, create_grid


def test_the_numbers_of_a_step() -> None:
    """Two layers of four experts: the second is out of balance, and one of its experts got no token."""
    shape = MoEShape(
        hidden_size=4, ffn_size=4, router=RouterShape(num_experts=4, top_k=2), activation="silu", std=0.1, out_std=0.1
    )
    settings = RouterSettings()
    layers = {f"blocks.{index}.mlp": MoE(shape, ExpertParallel(), settings) for index in (1, 10)}
    model = nn.Module()
    for name, layer in layers.items():
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module("mlp", layer)
    routers = find_routers(model, create_grid(Layout(), 0), settings, 0.0)
    assert routers is not None
    routers.begin_step(2, 1.0)
    given = {"blocks.1.mlp": [10.0, 10.0, 10.0, 10.0], "blocks.10.mlp": [0.0, 24.0, 8.0, 8.0]}
    for name, counts in given.items():
        for _ in range(2):
            layers[name].load.add(torch.tensor(counts) / 2, torch.tensor(1.5), torch.tensor(0.25))
    found = routers.metrics(routers.collect(torch.device("cpu")).tolist())
    uneven = -sum(p * math.log(p, 4) for p in (0.6, 0.2, 0.2))
    values = (3.0, 0.5, 0.0, 10.0, 24.0, 10.0, 1.0, (1 + uneven) / 2, 0.0)
    assert found == pytest.approx(dict(zip(METRICS, values, strict=True)))
    step = StepMetrics(1, 2.0, 1.0, 3e-4, 20, 0.5, 40.0, 0.1, metrics=found)
    assert step.expert_loads == (0.0, 2.4)


def test_no_load_without_experts_or_tokens() -> None:
    plain = StepMetrics(1, 2.0, 1.0, 3e-4, 20, 0.5, 40.0, 0.1, metrics={"accuracy": 0.5})
    nothing = StepMetrics(1, 2.0, 1.0, 3e-4, 20, 0.5, 40.0, 0.1, metrics=dict.fromkeys(METRICS, 0.0))
    assert plain.expert_loads is None and nothing.expert_loads is None
