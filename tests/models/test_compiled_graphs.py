"""The number of graphs that torch.compile makes of a block, and that they compute what the block does.

Nothing is fused across two graphs. No code is generated here: the graphs run as they are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.layers import onednn
from megatron_ds.layers.linear import RowParallelLinear
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.models.block import Block
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import HIDDEN
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.tensor import TensorParallel
from megatron_ds.runtime import Session, load_model
from tests.parity.cases import Recipe
from tests.parity.reference import ALL_CONFIGS, train_reference
from tests.ranks import rank_device, run_alone, run_grid, run_ranks


class Graphs:
    """A backend that counts its graphs, which have no `autograd.Function`: torch 2.11 can lose its gradients."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        assert "autograd_function_apply" not in {getattr(node.target, "__name__", "") for node in graph.graph.nodes}
        return graph.forward


def _block(
    grid: Grid, case: str, compiled: bool, divided_by_zero_3: bool, eager_products: bool = False
) -> tuple[int, list[Tensor]]:
    graphs = Graphs()
    tp = TensorParallel(grid.tensor, eager_products=eager_products)
    ctx = BuildContext(tp, compiled=compiled, compiler=graphs)
    layers = read_model(ALL_CONFIGS[case]).core.build_layers(ctx)
    block = next(spec for spec in layers if spec.is_block).build()
    assert isinstance(block, Block)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(initial_shard(name, spec_of(parameter), 5, grid.model_axes))
            if divided_by_zero_3:
                parameter.ds_id = 0
    x = torch.randn(8, 2, block.config.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for _ in range(2):  # the second time nothing is compiled anew
        y = block({HIDDEN: x})[HIDDEN]
    grads = torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
    return graphs.count, [y.detach(), *grads]


@pytest.mark.parametrize(
    ("case", "tensor", "divided_by_zero_3", "graphs"),
    [
        ("llama", 1, False, 1),
        ("gpt2", 1, False, 1),
        ("llama", 1, True, 5),
        ("llama", 2, False, 5),
    ],
)
def test_a_block_is_one_graph_without_communication(
    case: str, tensor: int, divided_by_zero_3: bool, graphs: int
) -> None:
    """Each of its four linear layers stands between two graphs where it communicates, or where ZeRO-3 divides it."""
    layout = Layout(tensor=tensor)
    plain = run_grid(_block, layout, case, False, divided_by_zero_3)
    for (count, found), (none, expected) in zip(run_grid(_block, layout, case, True, divided_by_zero_3), plain):
        assert (count, none) == (graphs, 0)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_products_that_are_faster_outside_stay_outside() -> None:
    (plain,) = run_grid(_block, Layout(), "llama", False, False, True)
    ((count, found),) = run_grid(_block, Layout(), "llama", True, False, True)
    assert count == 5
    for one, other in zip(found, plain[1]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _eager_products(info: RankInfo, directory: Path, is_faster: bool, precision: str) -> bool:
    onednn.faster_here = lambda: is_faster  # type: ignore[assignment]
    deepspeed = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": precision == "bf16"}}
    given = {"optimizer": None, "global_batch_size": 1, "micro_batch_size": 1, "deepspeed": deepspeed}
    engine = Session(info, rank_device()).build_engine(load_model(directory), **given).engine
    layers = [part for part in engine.deepspeed.module.modules() if isinstance(part, RowParallelLinear)]
    (eager,) = {layer.tp.eager_products for layer in layers}
    return bool(eager)


@pytest.mark.parametrize(
    ("is_faster", "precision", "eager"), [(True, "fp32", True), (False, "fp32", False), (True, "bf16", False)]
)
def test_engines_leave_products_to_onednn_where_it_is_faster(
    is_faster: bool, precision: str, eager: bool, tmp_path: Path
) -> None:
    run_alone(train_reference, "llama", Recipe(steps=0), tmp_path)
    assert run_ranks(_eager_products, 1, tmp_path, is_faster, precision) == [eager]
