"""Linear layers divided over tensor ranks equal torch's on one process: outputs and every gradient.

What is not divided (a row-parallel bias, a head that two ranks hold) must have its whole gradient on every rank.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_ds.layers import linear as linear_layers
from megatron_ds.layers.linear import ColumnParallelLinear, QKVLinear, ReplicatedLinear, RowParallelLinear
from megatron_ds.layers.products import keep_gradient_sum
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import FEATURES, LAYOUTS, SEQUENCE, B, Case, H, S, check
from tests.ranks import run_grid

OUT, DIM = 12, 4
Parameters = dict[str, Tensor]


def linear(parameters: Parameters, x: Tensor) -> Tensor:
    return F.linear(x, parameters["weight"], parameters.get("bias"))


def gate_and_up(parameters: Parameters, x: Tensor) -> Tensor:
    """(S, B, 2, F): fused, each half divided."""
    return F.linear(x, parameters["weight"].flatten(0, 1), parameters["bias"].flatten()).unflatten(-1, (2, OUT))


class Unfused(nn.Module):
    """A fused layer whose output's dims are shown, so that ranks' parts can be put together along the last one."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        fused = ColumnParallelLinear(H, (2, OUT), tp, std=1.0, bias=True, split_dim=1)
        self.weight, self.bias, self.fused = fused.weight, fused.bias, [fused]

    def forward(self, x: Tensor) -> Tensor:
        return self.fused[0](x).unflatten(-1, (2, -1))


class Joined(nn.Module):
    """Queries plus keys and values of their group, as one tensor: (S, B, N, 3, D) by query head."""

    def __init__(self, tp: TensorParallel, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.qkv = QKVLinear(H, heads, kv_heads, DIM, tp, q_std=1.0, kv_std=1.0, bias=True)
        local = heads // tp.axis.size
        held = len(self.qkv.kv_weight) // (2 * DIM)
        self.kv_of_head = [head // (heads // kv_heads) % held for head in range(tp.axis.rank * local, heads)][:local]

    def forward(self, x: Tensor) -> Tensor:
        q, kv = self.qkv(x)
        return joined(q, kv, self.kv_of_head)


def joined(q: Tensor, kv: Tensor, kv_of_head: list[int]) -> Tensor:
    """(S, B, D, 3, N): heads last, which ranks divide."""
    queries, pairs = q.unflatten(-1, (-1, DIM)), kv.unflatten(-1, (-1, 2, DIM))[:, :, kv_of_head]
    return torch.cat([queries[:, :, :, None], pairs], 3).transpose(2, 4)


def qkv(heads: int, kv_heads: int) -> Case:
    def plain(parameters: Parameters, x: Tensor) -> Tensor:
        q = F.linear(x, parameters["qkv.q_weight"], parameters["qkv.q_bias"])
        kv = F.linear(x, parameters["qkv.kv_weight"], parameters["qkv.kv_bias"])
        return joined(q, kv, [head // (heads // kv_heads) for head in range(heads)])

    names = ("qkv.q_weight", "qkv.kv_weight", "qkv.q_bias", "qkv.kv_bias")
    rows = heads * DIM, kv_heads * 2 * DIM
    return Case(
        build=lambda tp: Joined(tp, heads, kv_heads),
        plain=plain,
        parameters=dict(zip(names, ((rows[0], H), (rows[1], H), rows[:1], rows[1:]))),
        split=dict.fromkeys(names, 0),
        heads={name: kv_heads for name in names if ".kv_" in name},
        y=FEATURES,
    )


COLUMN = Case(
    build=lambda tp: ColumnParallelLinear(H, (OUT,), tp, std=1.0, bias=True),
    plain=linear,
    parameters={"weight": (OUT, H), "bias": (OUT,)},
    split={"weight": 0, "bias": 0},
    y=FEATURES,
)
ROW = Case(
    build=lambda tp: RowParallelLinear(OUT, H, tp, std=1.0, bias=True),
    plain=linear,
    parameters={"weight": (H, OUT), "bias": (H,)},
    split={"weight": 1},
    inputs=((S, B, OUT),),
    x=FEATURES,
    y=SEQUENCE,
)
CASES = {
    "column": COLUMN,
    "column without bias": replace(
        COLUMN, build=lambda tp: ColumnParallelLinear(H, (OUT,), tp, std=1.0), parameters={"weight": (OUT, H)}
    ),
    "fused gate and up": replace(
        COLUMN,
        build=Unfused,
        plain=gate_and_up,
        parameters={"weight": (2, OUT, H), "bias": (2, OUT)},
        split={"weight": 1, "bias": 1},
    ),
    "row": ROW,
    "row without bias": replace(
        ROW, build=lambda tp: RowParallelLinear(OUT, H, tp, std=1.0), parameters={"weight": (H, OUT)}
    ),
    "a key head each": qkv(4, 4),
    "grouped heads": qkv(4, 2),
    "one key head that all ranks hold": qkv(4, 1),
    "replicated": Case(
        build=lambda tp: ReplicatedLinear(H, OUT, tp, std=1.0, bias=True),
        plain=linear,
        parameters={"weight": (OUT, H), "bias": (OUT,)},
    ),
}


@pytest.mark.parametrize(("tp", "sequence"), LAYOUTS)
def test_equals_torch(tp: int, sequence: bool) -> None:
    check(CASES, tp, sequence)


class Issued(TorchDispatchMode):
    """Products and collectives in the order in which they are issued, and waits for collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            of_weight = args[-1].shape[0] == S * B  # summed over tokens
            self.order.append("weight product" if of_weight else "input product")
        return func(*args, **(kwargs or {}))

    def record(self, begin: Any, name: str) -> Any:
        def begun(*arguments: Any) -> Any:
            self.order.append(f"begin {name}")
            found = begin(*arguments)
            work = found[1] if isinstance(found, tuple) else found
            wait = work.wait
            work.wait = lambda: (self.order.append(f"wait {name}"), wait())  # type: ignore[attr-defined]
            return found

        return begun


class Work:
    """A work that can be recorded."""

    def __init__(self, work: Any) -> None:
        self.wait = work.wait


def _order(grid: Grid, sequence: bool) -> list[str]:
    issued = Issued()
    for name in ("all_reduce_", "all_gather_dim0", "reduce_scatter_dim0"):
        begin = getattr(linear_layers, f"begin_{name}")

        def recordable(*arguments: Any, begin: Any = begin) -> Any:
            found = begin(*arguments)
            return (found[0], Work(found[1])) if isinstance(found, tuple) else Work(found)

        setattr(linear_layers, f"begin_{name}", issued.record(recordable, name.rstrip("_").removesuffix("_dim0")))
    layer = ColumnParallelLinear(H, (OUT,), TensorParallel(grid.tensor, sequence), std=1.0)
    torch.nn.init.normal_(layer.weight)
    y = layer(torch.randn(S // 2 if sequence else S, B, H, requires_grad=True))
    with issued:
        y.backward(torch.ones_like(y))
    return issued.order


@pytest.mark.parametrize("sequence", [False, True])
def test_collectives_of_the_backward_pass_begin_before_the_products_that_hide_them(sequence: bool) -> None:
    """The order of launches, which a GPU keeps with one connection to the device."""
    reduction = "reduce_scatter" if sequence else "all_reduce"
    gather = ["begin all_gather"] if sequence else []
    expected = [*gather, "input product", f"begin {reduction}"]
    expected += [*(["wait all_gather"] if sequence else []), "weight product", f"wait {reduction}"]
    assert run_grid(_order, Layout(tensor=2), sequence) == [expected] * 2


def _sums(grid: Grid) -> dict[str, tuple[Tensor, bool]]:
    """By weight, its gradient of two recomputed passes plus a sum of 1, and whether autograd has a part of it."""
    tp = TensorParallel(grid.tensor)
    layers = {
        "qkv": QKVLinear(H, 4, 1, DIM, tp, q_std=1.0, kv_std=1.0, bias=False),
        "row": RowParallelLinear(H * tp.axis.size, OUT, tp, std=1.0),
    }
    found = {}
    for kind, layer in layers.items():
        for parameter in layer.parameters():
            torch.nn.init.constant_(parameter, 0.1)
            keep_gradient_sum(parameter, torch.ones_like(parameter))
        for seed in range(2):
            x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed), requires_grad=True)
            y = checkpoint(layer, x, use_reentrant=False)
            parts = y if isinstance(y, tuple) else (y,)
            torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
        for name, parameter in layer.named_parameters():
            total, left = parameter.gradient_sum, parameter.grad
            found[f"{kind}.{name}"] = (total if left is None else total + left, left is not None)
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_weight_gradients_are_added_to_their_sums(tensor: int) -> None:
    """Except those of key and value heads that ranks share, which the ranks add up first."""
    inputs = sum(torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed)).sum((0, 1)) for seed in range(2))
    for found in run_grid(_sums, Layout(tensor=tensor)):
        by_autograd = {name for name, (_, has_gradient) in found.items() if has_gradient}
        assert by_autograd == ({"qkv.kv_weight"} if tensor == 2 else set())
        for name, (total, _) in found.items():
            ranks = tensor if name == "qkv.kv_weight" else 1
            torch.testing.assert_close(total, (1.0 + ranks * inputs).expand_as(total), rtol=1e-5, atol=1e-5)
