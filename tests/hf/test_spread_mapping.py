"""Tensors that are one an expert: both directions, shares, types, and who reads what."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.family import Part, Row, each_expert
from megatron_ds.hf.spread_mapping import Spread
from megatron_ds.hf.tensor_mapping import FusedPiece, Op
from megatron_ds.hf.to_hf import ToHF, assert_each_once
from megatron_ds.hf.weights import read_shard
from megatron_ds.layers.param_spec import AxisSplit, ParamSpec
from megatron_ds.parallel.grid import Axis

SIZES = {"x": 12, "m": 3, "h": 5}
UP = each_expert("up", ("e.{x}.gate", "e.{x}.up"), Op(("m h",) * 2, "* m h"), 12)
DOWN = each_expert("down", ("e.{x}.down",), Op(("h m",), "h m"), 12)


def tensors(row: Row) -> dict[str, Tensor]:
    """Every element of every tensor is a different number."""
    found: dict[str, Tensor] = {}
    for source, name in enumerate(row.names):
        shape = row.op.source_shape(source, SIZES)
        found[name] = 1000 * source + torch.arange(15).reshape(shape)
    return found


def reader(row: Row, opened: list[str]) -> Callable[[int], Tensor]:
    found = tensors(row)

    def read(source: int) -> Tensor:
        opened.append(row.names[source])
        return found[row.names[source]]

    return read


def test_gate_and_up_of_one_expert_after_the_other() -> None:
    """Written out by hand; experts are in the order of their numbers, in which 10 comes after 2."""
    assert UP.names[:4] == ("e.0.gate", "e.0.up", "e.1.gate", "e.1.up") and UP.names[20] == "e.10.gate"
    native, found = UP.op.read(reader(UP, []), SIZES), tensors(UP)
    assert native.shape == UP.op.native_shape(SIZES) == (12, 2, 3, 5)
    for expert in range(12):
        assert torch.equal(native[expert, 0], found[f"e.{expert}.gate"])
        assert torch.equal(native[expert, 1], found[f"e.{expert}.up"])


@pytest.mark.parametrize("row", [UP, DOWN], ids=["up", "down"])
def test_an_export_is_what_was_read_in_views(row: Row) -> None:
    native = row.op.read(reader(row, []), SIZES)
    found = dict(ToHF(_Table(row)).add(row.native, native))
    assert list(found) == list(row.names)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(row).items())
    pointer = native.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == pointer for tensor in found.values())
    ordered = [(name, tuple(tensor.shape)) for name, tensor in tensors(row).items()]
    assert list(ToHF(_Table(row)).order([Part(row.native)])) == ordered
    assert_each_once({row.native: row})


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("row", [UP, DOWN], ids=["up", "down"])
def test_a_rank_opens_the_tensors_of_its_own_experts(row: Row, size: int) -> None:
    whole = row.op.read(reader(row, []), SIZES)
    spec = ParamSpec(tuple(whole.shape), (AxisSplit(0, "expert"),))
    each, seen = -(-12 // size), list[str]()
    for rank in range(size):
        opened: list[str] = []
        axes = {"tensor": Axis(size, rank), "expert": Axis(size, rank)}
        shard = read_shard(row, SIZES, reader(row, opened), spec, axes)
        assert torch.equal(shard[: 12 - rank * each], whole[rank * each : (rank + 1) * each])
        assert {name.split(".")[1] for name in opened} == {str(one) for one in range(12)[rank * each :][:each]}
        seen += opened
    assert sorted(seen) == sorted(row.names)


def test_a_fused_tensor_of_all_experts_is_shared_by_the_same_axis() -> None:
    """A view of it: no expert of another rank is touched."""
    pattern = "x [m|m] h"
    row = Row("up", ("w",) * 2, Op((FusedPiece(pattern, 0), FusedPiece(pattern, 1)), "x * m h"), "x")
    whole = torch.arange(12 * 6 * 5).reshape(12, 6, 5)
    spec = ParamSpec((12, 2, 3, 5), (AxisSplit(0, "expert"),))
    shard = read_shard(row, SIZES, lambda source: whole, spec, {"expert": Axis(4, 1)})
    assert torch.equal(shard, whole.reshape(12, 2, 3, 5)[3:6])
    assert shard.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_experts_of_different_types_are_stacked_without_loss() -> None:
    op = Spread(Op(("m",), "m"), "x", 3)
    found = [
        torch.tensor([1 + 2**-7]).bfloat16(),
        torch.tensor([1 + 2**-10]).half(),
        torch.tensor([1 / 3], dtype=torch.float64),
    ]
    whole = op.read(lambda source: found[source], {"x": 3, "m": 1})
    assert whole.flatten().tolist() == [1 + 2**-7, 1 + 2**-10, 1 / 3]


def test_bytes_to_stack_in_are_used() -> None:
    place = torch.empty(12 * 15 * 8, dtype=torch.uint8)
    whole = DOWN.op.read(reader(DOWN, []), SIZES, place=place)
    assert whole.untyped_storage().data_ptr() == place.untyped_storage().data_ptr()


def test_layers_of_a_row() -> None:
    row = Row("blocks.{n}.mlp.down.weight", ("layers.{n}.w",), Op(("h m",), "h m"), layers=(1, 3))
    assert row.at(3).names == ("layers.3.w",) and row.at(3).layers is None


def test_one_operation_is_of_full_tensors_without_the_axis() -> None:
    with pytest.raises(AssertionError):
        Spread(Op(("x m",), "x m"), "x", 2)
    with pytest.raises(AssertionError):
        Spread(Op((FusedPiece("[m|m] h", 0), FusedPiece("[m|m] h", 1)), "* m h"), "x", 2)


class _Table:
    """A table of one row."""

    def __init__(self, row: Row) -> None:
        self.table, self.axis_sizes = {row.native: row}, SIZES


@pytest.mark.parametrize("row", [UP, DOWN], ids=["up", "down"])
def test_experts_are_written_one_by_one(row: Row) -> None:
    native, to_hf, found = row.op.read(reader(row, []), SIZES), ToHF(_Table(row)), list[tuple[str, Tensor]]()
    assert [part.expert for part in row.parts] == list(range(12))
    for name, expert in reversed(row.parts):
        added = list(to_hf.add(name, native[expert], expert))
        assert {theirs.split(".")[1] for theirs, _ in added} == {str(expert)}
        assert [(theirs, tuple(one.shape)) for theirs, one in added] == list(to_hf.order([Part(name, expert)]))
        found += added
    assert sorted(dict(found)) == sorted(row.names) and len(found) == len(row.names)
    assert all(torch.equal(tensor, tensors(row)[theirs]) for theirs, tensor in found)
