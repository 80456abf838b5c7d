"""Every operation is a bijection, whole and in shards; fused tensors are the sum of their pieces."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.hf.tensor_mapping import FusedPiece, Op, tile
from tests.parity.cases import CONFIGS


@dataclass(frozen=True)
class Case:
    """Operations that take all of some Hugging Face tensors.

    Attributes:
        ops: each with the tensors that its sources are, or are pieces of.
        sizes: of the axes.
        axes: axis to split, one an operation.
    """

    ops: list[tuple[Op, tuple[str, ...]]]
    sizes: dict[str, int]
    axes: list[str | None]


def plain_case(rng: random.Random) -> Case:
    """An operation of one to three whole tensors over up to five axes."""
    sizes = {axis: rng.choice([1, 2, 3, 4, 6]) for axis in "abcde"[: rng.randint(1, 5)]}
    count = rng.randint(1, 3)
    sources = tuple(grouped(rng, shuffled(rng, [*sizes])) for _ in range(count))
    op = Op(sources, random_native(rng, [*sizes], count))
    return Case([(op, tuple(f"t{number}" for number in range(count)))], sizes, [random_axis(rng, op, sizes)])


def fused_case(rng: random.Random) -> Case:
    """A fused tensor of two to four pieces: pieces of the same axes are stacked in one parameter, others by itself."""
    sizes = {axis: rng.choice([1, 2, 3, 4]) for axis in "abcdexy"}
    names = shuffled(rng, list("abcde"))
    outer, inner, rest = names[: rng.randint(0, 2)], names[2 : 2 + rng.randint(0, 1)], names[3 : 3 + rng.randint(0, 2)]
    kinds = [["x"], ["y"], ["x", "y"], []]
    kinds = rng.sample(kinds, rng.randint(1, 2))
    pieces = shuffled(rng, [index for index in range(len(kinds)) for _ in range(rng.randint(1, 2))])
    if len(pieces) == 1:
        pieces *= 2
    bracket = "[" + "|".join(" ".join(kinds[index]) or "1" for index in pieces) + "]"
    fused = f"({' '.join([*outer, bracket, *inner])})"
    pattern = " ".join(shuffled(rng, [fused, *dims_of(rng, rest)]))
    ops = []
    for index, kind in enumerate(kinds):
        parts = tuple(FusedPiece(pattern, piece) for piece, owner in enumerate(pieces) if owner == index)
        axes = [*outer, *kind, *inner, *rest]
        if parts and axes:
            ops.append((Op(parts, random_native(rng, axes, len(parts))), ("t",) * len(parts)))
    if not ops or sum(len(names) for _, names in ops) < len(pieces):  # a piece without any axis: draw again
        return fused_case(rng)
    return Case(ops, sizes, [random_axis(rng, op, sizes) for op, _ in ops])


def random_native(rng: random.Random, axes: list[str], count: int) -> str:
    return grouped(rng, shuffled(rng, axes + ["*"] * (count > 1)))


def random_axis(rng: random.Random, op: Op, sizes: dict[str, int]) -> str | None:
    """An axis that leads a native dim, as those do that tensor parallelism divides."""
    leading = []
    for axis in op.native_axes:
        try:
            op.split_dim(axis)
        except AssertionError:
            continue
        leading.append(axis)
    return rng.choice([*(axis for axis in leading if axis != "*" and sizes[axis] > 1), None])


def shuffled(rng: random.Random, names: list[Any]) -> list[Any]:
    return rng.sample(names, len(names))


def dims_of(rng: random.Random, names: list[str]) -> list[str]:
    """Dims of one or several axes, in this order."""
    dims: list[list[str]] = []
    for name in names:
        if dims and rng.random() < 0.5:
            dims[-1].append(name)
        else:
            dims.append([name])
    return [f"({' '.join(dim)})" if len(dim) > 1 else dim[0] for dim in dims]


def grouped(rng: random.Random, names: list[str]) -> str:
    return " ".join(dims_of(rng, names))


def numbered(case: Case) -> dict[str, Tensor]:
    """The Hugging Face tensors; every element is a different number."""
    tensors: dict[str, Tensor] = {}
    first = 0
    for op, names in case.ops:
        for source, name in enumerate(names):
            shape = op.source_shape(source, case.sizes)
            assert name not in tensors or tensors[name].shape == shape
            if name not in tensors:
                tensors[name] = torch.arange(first, first + prod(shape)).reshape(shape)
                first += prod(shape)
    return tensors


def reader(tensors: dict[str, Tensor], names: Sequence[str]) -> Callable[[int], Tensor]:
    return lambda source: tensors[names[source]]


def written(case: Case, natives: list[Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (op, names), native in zip(case.ops, natives):
        for source, name in enumerate(names):
            if op.is_piece(source):
                tensors.setdefault(name, torch.full(op.source_shape(source, case.sizes), -1))
                op.write_piece(source, native, case.sizes, tensors[name])
            else:
                tensors[name] = op.write(source, native, case.sizes)
    return tensors


def check_bijection(case: Case) -> None:
    """Each element of the tensors is one of the parameters', and `write` puts it back; and the other way round."""
    tensors = numbered(case)
    natives = [op.read(reader(tensors, names), case.sizes) for op, names in case.ops]
    for (op, _), native in zip(case.ops, natives):
        assert native.shape == op.native_shape(case.sizes), case
    elements = torch.cat([native.flatten() for native in natives]).sort().values
    assert torch.equal(elements, torch.arange(sum(tensor.numel() for tensor in tensors.values()))), case
    back = written(case, natives)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items()), case
    others = [torch.randperm(native.numel()).reshape(native.shape) for native in natives]
    made = written(case, others)
    for (op, names), other in zip(case.ops, others):
        assert torch.equal(op.read(reader(made, names), case.sizes), other), case


def check_shards(case: Case) -> int:
    """Shares are the whole, cut, at every size that divides the axis, and at sizes that leave the last one shorter."""
    tensors, checked = numbered(case), 0
    for (op, names), axis in zip(case.ops, case.axes):
        if axis is None:
            continue
        native, dim, length = op.read(reader(tensors, names), case.sizes), op.split_dim(axis), case.sizes[axis]
        assert dim is not None
        for size in range(1, length + 2):
            step = -(-length // size)
            bounds = [(min(rank * step, length), min((rank + 1) * step, length)) for rank in range(size)]
            shards = [op.read(reader(tensors, names), case.sizes, axis, *bound) for bound in bounds]
            assert torch.equal(torch.cat(shards, dim=dim), native), case
            checked += 1
    return checked


@pytest.mark.parametrize("kind", [plain_case, fused_case])
@pytest.mark.parametrize("first_seed", [0, 100, 200])
def test_random_operations(kind: Callable[[random.Random], Case], first_seed: int) -> None:
    shards = 0
    for seed in range(first_seed, first_seed + 100):
        case = kind(random.Random(seed))
        check_bijection(case)
        shards += check_shards(case)
    assert shards > 100


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_of_every_table(name: str) -> None:
    model = read_model(CONFIGS[name])
    rows = list(model.table.values())
    case = Case([(row.op, row.names) for row in rows], model.axis_sizes, [row.split for row in rows])
    check_bijection(case)
    assert check_shards(case) > 4 * 4
    uses = defaultdict(list)
    for row in rows:
        for tensor, source in zip(row.names, row.op.sources):
            uses[tensor].append(source)
    assert all(tile(sources) for sources in uses.values())


def test_a_share_is_a_view_where_nothing_is_stacked_or_merged() -> None:
    """So that reading a share touches nothing else of a file, and copies nothing."""
    whole, sizes = torch.arange(48), {"k": 4, "g": 2, "d": 3, "h": 1}
    op = Op((FusedPiece("(k [g|1|1] d) h", 0),), "k g d h")
    share = op.read(lambda source: whole.reshape(48, 1), sizes, "k", 1, 3)
    assert share.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert share.flatten().tolist() == [*range(12, 18), *range(24, 30)]


def test_sources_of_different_types_are_stacked_without_loss() -> None:
    op = Op(("a",) * 3, "* a")
    tensors = [torch.tensor([1 + 2**-7]).bfloat16(), torch.tensor([1 + 2**-10]).half(), torch.tensor([1 / 3]).double()]
    whole = op.read(lambda source: tensors[source], {"a": 1})
    assert whole.dtype == torch.float64
    assert whole.flatten().tolist() == [1 + 2**-7, 1 + 2**-10, torch.tensor([1 / 3]).double().item()]


def test_gpt2_qkv_is_heads_of_q_then_k_beside_v() -> None:
    """Written out by hand: GPT-2's columns are Q|K|V blocks of heads."""
    hidden, heads, dim = 6, 3, 2
    model = read_model({"model_type": "gpt2", "n_embd": hidden, "n_head": heads, "n_layer": 1})
    theirs = torch.arange(hidden * 3 * hidden).reshape(hidden, 3 * hidden)
    q, kv = (
        model.table[f"blocks.0.attention.qkv.{part}_weight"].op.read(lambda source: theirs, model.axis_sizes)
        for part in ("q", "kv")
    )
    for head in range(heads):
        for d in range(dim):
            columns = [theirs[:, part * hidden + head * dim + d] for part in range(3)]
            assert torch.equal(q[head * dim + d], columns[0])
            for part in range(2):
                assert torch.equal(kv[(head * 2 + part) * dim + d], columns[1 + part])


def test_llama_keys_stand_beside_values() -> None:
    """Written out by hand."""
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8, "num_hidden_layers": 1}
    model = read_model({"model_type": "llama", **config})
    k, v = torch.arange(100, 132).reshape(4, 8), torch.arange(200, 232).reshape(4, 8)
    native = model.table["blocks.0.attention.qkv.kv_weight"].op.read(lambda source: (k, v)[source], model.axis_sizes)
    assert torch.equal(native, torch.cat([k[0:2], v[0:2], k[2:4], v[2:4]]))


def test_grouped_fusion_by_hand() -> None:
    """Two key heads with two query heads each, of one dim: q q k v, q q k v."""
    layout, sizes = "(k [g|1|1] d)", {"k": 2, "g": 2, "d": 1}
    q, kv = Op((FusedPiece(layout, 0),), "(k g d)"), Op((FusedPiece(layout, 1), FusedPiece(layout, 2)), "(k * d)")
    fused = torch.arange(8)
    assert q.read(lambda source: fused, sizes).tolist() == [0, 1, 4, 5]
    assert kv.read(lambda source: fused, sizes).tolist() == [2, 3, 6, 7]
    assert kv.read(lambda source: fused, sizes, "k", 1, 2).tolist() == [6, 7]


LAYOUT = "(k [g|1|1] d) h"


@pytest.mark.parametrize(
    ("sources", "native"),
    [
        (("a b",), "b"),  # an element would be lost
        (("a a",), "a a"),  # a diagonal is no bijection
        (("a b", "a b"), "a b"),  # two sources and no place to stack them
        (("a b",), "* a b"),  # a place to stack and one source
        (("a b", "a c b"), "* a b"),  # an axis that the native parameter does not have
        ((LAYOUT,), "(k g d) h"),  # a fused tensor, and no piece said
        ((FusedPiece("a b", 0),), "a b"),  # a piece of what is not fused
        ((FusedPiece(LAYOUT, 3),), "(k d) h"),  # there are three
        ((FusedPiece(LAYOUT, -1),), "(k d) h"),
        ((FusedPiece("[a|a] [b|b]", 0),), "a b"),  # two fused dims
        (("a",), "[a|a]"),  # fused is what is on disk
    ],
)
def test_what_is_no_bijection_cannot_be_written_down(sources: tuple[str | FusedPiece, ...], native: str) -> None:
    with pytest.raises(AssertionError):
        Op(sources, native)


def test_pieces_tile_a_tensor() -> None:
    pieces = [FusedPiece(LAYOUT, piece) for piece in range(3)]
    assert tile(pieces) and tile(pieces[::-1]) and tile(["a b"])
    assert not tile(pieces[:2])  # a piece that no parameter holds
    assert not tile([*pieces, pieces[0]])  # one that two hold
    assert not tile([*pieces, "a b"]) and not tile(["a b", "a b"])
    assert not tile([*pieces[:2], FusedPiece("(k [g|1|1] e) h", 2)])  # two opinions of one tensor
