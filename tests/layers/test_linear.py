"""Linear layers divided over tensor ranks equal torch's on one process: outputs and every gradient.

What is not divided (a row-parallel bias, a head that two ranks hold) must have its whole gradient on every rank.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.linear import ColumnParallelLinear, QKVLinear, ReplicatedLinear, RowParallelLinear
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import FEATURES, LAYOUTS, SEQUENCE, B, Case, H, S, check

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
