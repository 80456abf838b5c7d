"""Matrices reach their owners whole, and come back, from any division over ranks; all elements travel once each way."""

import random
from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.engine.matrix_exchange import Holding, MatrixExchange, MatrixKey, Piece, Transfer, deal
from megatron_ds.layers.param_spec import Matrices, ParamSpec, over_experts, over_tensor
from megatron_ds.parallel.grid import EXPERT, Axis
from megatron_ds.parallel.rank_info import RankInfo
from tests.parallel.axes import axes_at
from tests.ranks import run_ranks

CPU = torch.device("cpu")
KV = Matrices(alternating=2, block_rows=3)
SPECS = {
    0: ParamSpec((8, 6), over_tensor(0), matrices=Matrices()),  # column-parallel
    1: ParamSpec((2, 8, 5), over_tensor(1), matrices=Matrices()),  # gate and up
    2: ParamSpec((24, 5), over_tensor(0, 4), matrices=KV),  # keys and values of 4 heads
    3: ParamSpec((12, 5), over_tensor(0, 2), matrices=KV),  # of 2 heads, which several ranks hold
    4: ParamSpec((5, 12), over_tensor(1), matrices=Matrices()),  # row-parallel
    5: ParamSpec((7, 3), matrices=Matrices()),  # on all tensor ranks
    6: ParamSpec((4, 2, 3, 5), over_experts(), matrices=Matrices()),
    7: ParamSpec((4, 5, 3), over_experts(), matrices=Matrices()),
}
MOST = 60  # elements that an owner gets in a round; no matrix has more


def full(number: int) -> Tensor:
    """A parameter whose elements are all different."""
    size = prod(SPECS[number].shape)
    return torch.arange(1000 * number, 1000 * number + size, dtype=torch.float32).view(SPECS[number].shape)


def matrices_of(spec: ParamSpec, values: Tensor) -> list[Tensor]:
    """The matrices of a parameter, by plain indexing."""
    assert spec.matrices is not None
    if spec.matrices.alternating == 1:
        return list(values.reshape(-1, *values.shape[-2:]))
    blocks = values.view(-1, 2, spec.matrices.block_rows, values.shape[-1])
    return [blocks[:, index].reshape(-1, values.shape[-1]) for index in range(2)]


def held_by_ranks(tensor: int, data: int, zero: str) -> list[dict[Holding, Tensor]]:
    """For each rank, data slowest, the ranges that it holds, with their elements.

    The expert ranks are the tensor ranks. ZeRO divides every parameter, or all of them in one vector.
    """
    found: list[dict[Holding, Tensor]] = []
    for rank in range(data * tensor):
        axes = axes_at(tensor=(rank % tensor, tensor), **{EXPERT: (rank % tensor, tensor)})
        begin, own = 0, dict[Holding, Tensor]()
        flat = sum(prod(spec.local_shape(axes)) for spec in SPECS.values())
        for number, spec in SPECS.items():
            ranges = spec.local_ranges(axes)
            shard = full(number)[tuple(slice(*one) for one in ranges)].reshape(-1)
            low, high = {
                "none": (0, len(shard)),
                "each": [-(-len(shard) // data) * (rank // tensor + more) for more in (0, 1)],
                "flat": [-(-flat // data) * (rank // tensor + more) - begin for more in (0, 1)],
            }[zero]
            low, high = max(low, 0), min(high, len(shard))
            if low < high:
                own[Holding(number, ranges, low, high)] = shard[low:high].clone()
            begin += len(shard)
        found.append(own)
    return found


def exchange(info: RankInfo, tensor: int, data: int, zero: str) -> tuple[dict[Any, Any], int, list[int]]:
    """The matrices that this rank owns, elements that it sent to others, and the largest buffers."""
    axis = Axis(info.world_size, info.rank, tuple(range(info.world_size)), dist.group.WORLD)
    held = held_by_ranks(tensor, data, zero)
    plan = MatrixExchange(SPECS, [list(one) for one in held], axis, CPU, MOST)
    own = held[info.rank]
    seen: dict[MatrixKey, Tensor] = {}
    sent, calls = 0, list[int]()

    def counted(
        out: Tensor, x: Tensor, received: Any, counts: list[int], real: Any = dist.all_to_all_single, **kw: Any
    ):
        nonlocal sent
        sent += sum(count for rank, count in enumerate(counts) if rank != info.rank)
        calls.append(out.numel())
        return real(out, x, received, counts, **kw)

    def replace(matrices: dict[MatrixKey, Tensor]) -> dict[MatrixKey, Tensor]:
        seen.update({key: matrix.clone() for key, matrix in matrices.items()})
        return {
            key: -matrix.mT.contiguous().mT for key, matrix in matrices.items()
        }  # not contiguous: any order will do

    def write(transfer: Transfer, elements: Tensor) -> None:
        transfer.piece.of(own[transfer.holding]).copy_(elements)

    dist.all_to_all_single, real = counted, dist.all_to_all_single
    plan.run(lambda transfer: transfer.piece.of(own[transfer.holding]), replace, write, torch.float32)
    dist.all_to_all_single = real
    for holding, was in held_by_ranks(tensor, data, zero)[info.rank].items():
        assert torch.equal(own[holding], -was), "every element comes back"
    return seen, sent, calls


def expected_traffic(tensor: int, data: int, zero: str, owners: Mapping[MatrixKey, int]) -> int:
    """Elements that all ranks send: to an owner those that it lacks, and back all copies that are not its own.

    All elements of all parameters are different numbers, so that the ranks which hold one are found by its value.
    """
    holders: dict[float, set[int]] = {}
    for rank, own in enumerate(held_by_ranks(tensor, data, zero)):
        for values in own.values():
            for value in values.tolist():
                holders.setdefault(value, set()).add(rank)
    total = 0
    for key, owner in owners.items():
        for value in matrices_of(SPECS[key.parameter], full(key.parameter))[key.matrix].flatten().tolist():
            total += (owner not in holders[value]) + len(holders[value] - {owner})
    return total


@pytest.mark.parametrize(
    ("tensor", "data", "zero"),
    [(2, 1, "none"), (1, 2, "flat"), (2, 2, "each"), (2, 2, "none"), (4, 1, "flat"), (1, 3, "each")],
)
def test_owners_get_whole_matrices(tensor: int, data: int, zero: str) -> None:
    results = run_ranks(exchange, tensor * data, tensor, data, zero)
    owners = {key: rank for rank, (seen, _, _) in enumerate(results) for key in seen}
    assert len(owners) == sum(len(seen) for seen, _, _ in results) == 1 + 2 + 2 + 2 + 1 + 1 + 8 + 4, (
        "each has one owner"
    )
    for seen, _, _ in results:
        for key, matrix in seen.items():
            spec = SPECS[key.parameter]
            assert torch.equal(matrix, matrices_of(spec, full(key.parameter))[key.matrix]), key
    assert sum(sent for _, sent, _ in results) == expected_traffic(tensor, data, zero, owners)
    assert len({len(calls) for _, _, calls in results}) == 1 and len(results[0][2]) > 2, "all ranks are in all rounds"
    assert max(size for _, _, calls in results for size in calls[::2]) <= MOST, "an owner gets no more in a round"


def test_work_is_shared_and_owners_hold_what_they_can() -> None:
    """Without borders inside of matrices nothing travels; else loads differ by one matrix at most."""
    for size in (1, 2, 3, 8):
        chance = random.Random(size)
        work = {MatrixKey(number, 0): chance.choice((1, 3, 10)) for number in range(40)}
        holding = Holding(0, ((0, 1), (0, 1)), 0, 1)
        everywhere = {key: {(holding, _piece()): list(range(size))} for key in work}
        owners = deal(work, everywhere, size)
        loads = [sum(work[key] for key in work if owners[key] == rank) for rank in range(size)]
        assert max(loads) - min(loads) <= max(work.values())
    equal = {MatrixKey(number, 0): 5 for number in range(8)}
    apart = {key: {(holding, _piece()): [key.parameter // 2]} for key in equal}
    assert all(owner == key.parameter // 2 for key, owner in deal(equal, apart, 4).items())


def _piece() -> Piece:
    return Piece(0, 0, (1, 1, 1, 1), 0, ((0, 1), (0, 1), (0, 1)))
