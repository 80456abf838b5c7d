"""Modules of transformers that adapters change, as projections of native weights; rows of the adapters' own tensors.

The rows follow from the family's table: a `lora_B` has the rows of the weight that it changes, a `lora_A` its columns.
Names are those of transformers' modules in memory, where all experts of a layer are in one parameter. peft has the A of
all of them in one matrix (experts * rank, in), and the B in one matrix (out, rank * experts).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import EMBEDDING, HEAD, Row
from megatron_ds.hf.tensor_mapping import STAR, FusedPiece, Op

EXPERT_AXIS = "x"  # the named axis of experts


@dataclass(frozen=True)
class Projection:
    """A source of a native weight: one projection of an attention or feed-forward layer, or a table of the vocabulary.

    Of experts it is that projection of all of them.

    Attributes:
        native: the weight's name.
        row: its row.
        source: index of the projection among the row's sources.
        parent, output: name of the layer that has the weight, and the projection's name in that layer.
        is_column, is_bare, low_rank_only: see `AdaptableWeight`.
        is_lookup: the weight is looked up: its rows, not its columns, are selected by the input.
        is_trainable: whether its layer here can have an adapter; those of others can only be merged.
    """

    native: str
    row: Row
    source: int
    parent: str
    output: str
    is_column: bool
    is_lookup: bool = False
    is_trainable: bool = True
    is_bare: bool = False
    low_rank_only: bool = False

    @property
    def is_of_experts(self) -> bool:
        """It is the projection of all experts of a layer."""
        return EXPERT_AXIS in self.row.op.native_axes[:1] and self.row.split == EXPERT_AXIS

    @property
    def in_dim(self) -> str:
        """Pattern of the input features."""
        dims = _dims(self.row.op.native)
        return dims[0] if self.is_lookup else dims[-1]

    @property
    def in_axes(self) -> list[str]:
        return self.in_dim.strip("()").split()

    @property
    def is_inputs_first(self) -> bool:
        """The module's weight in transformers is (in, out)."""
        source = self.row.op.sources[self.source]
        return _dims(source.pattern if isinstance(source, FusedPiece) else source)[0] == self.in_dim

    @property
    def out_dim(self) -> str:
        """Pattern of the output features, in the order of the native weight."""
        dims = [dim for dim in map(_without_star, _dims(self.row.op.native)) if dim]
        return " ".join(dim for dim in dims if dim not in (self.in_dim, EXPERT_AXIS if self.is_of_experts else ""))

    @property
    def given_out(self) -> str | FusedPiece:
        """Pattern of the output features in the module's own order."""
        source = self.row.op.sources[self.source]
        pattern = source.pattern if isinstance(source, FusedPiece) else source
        dims = _dims(pattern)
        if self.is_of_experts:
            dims.remove(EXPERT_AXIS)
        assert len(dims) == 2 and dims.count(self.in_dim) == 1, (pattern, self.in_dim)
        out = dims[1 - dims.index(self.in_dim)]
        return FusedPiece(out, source.piece) if isinstance(source, FusedPiece) else out


def in_memory(model: HFModel) -> HFModel:
    """Return the model with the names of transformers' modules in memory instead of those on disk."""
    return model.in_memory


def find_projections(model: HFModel) -> dict[str, tuple[Projection, ...]]:
    """Return transformers' name of each module that can be adapted -> its projections, in their order in it.

    Of a bare parameter it is the name of that parameter.

    Args:
        model: with the names in memory.
    """
    weights = {
        f"{parent}.{weight.name}": (f"{parent}.{weight.module}".rstrip("."), weight)
        for prefix, stack in model.core.stacks.items()
        for layer in range(stack.num_layers)
        for parent, shape in ((f"{prefix}.{layer}.{name}", shape) for name, shape in stack.sublayers(layer).items())
        for weight in shape.adaptable_weights
    }
    found: dict[str, list[Projection]] = {}
    for native in filter(weights.__contains__, model.table):
        row, (parent, weight) = model.table[native], weights[native]
        for source, (name, output) in enumerate(zip(row.names, weight.outputs, strict=True)):
            options = {"is_bare": weight.is_bare, "low_rank_only": weight.low_rank_only}
            one = Projection(native, row, source, parent, output, weight.is_column, **options)
            found.setdefault(name if weight.is_bare else name.removesuffix(".weight"), []).append(one)
    return {module: tuple(parts) for module, parts in found.items()}


def find_vocabulary_tables(model: HFModel) -> dict[str, tuple[Projection, ...]]:
    """Return transformers' names of the word embedding and the head -> the table; a tied head's is the embedding's."""
    rows, found = model.family.table(model.core), dict[str, tuple[Projection, ...]]()
    for native in (EMBEDDING, HEAD):
        if native not in rows:
            continue
        stored = EMBEDDING if native == HEAD and model.core.tied else native
        row = Row(stored, rows[native].names, rows[native].op, rows[native].split)
        parent, _, output = native.rpartition(".")
        one = Projection(
            stored, row, 0, parent, output, is_column=True, is_lookup=native == EMBEDDING, is_trainable=False
        )
        found[row.names[0].removesuffix(".weight")] = (one,)
    return found


def input_row(native: str, theirs: str, first: Projection, rank: str) -> Row:
    """Return the row of a parameter over the input features of a module, (rank, in), of experts (experts, rank, in)."""
    if first.is_of_experts:
        op = Op((f"({EXPERT_AXIS} {rank}) {first.in_dim}",), f"{EXPERT_AXIS} {rank} {first.in_dim}")
        return Row(native, (theirs,), op, EXPERT_AXIS)
    pattern = f"{rank} {first.in_dim}"
    return Row(native, (theirs,), Op((pattern,), pattern), None if first.is_column else first.row.split)


def output_row(native: str, theirs: str, one: Projection, rank: str | None) -> Row:
    """Return the row of a parameter over a projection's output features, in the order of its module.

    It is (out, rank), or (out,) without a rank; of experts (experts, out, rank).
    """
    more, given = ("" if rank is None else f" {rank}"), one.given_out
    inner = f" ({rank} {EXPERT_AXIS})" if one.is_of_experts else more
    source = FusedPiece(f"{given.pattern}{inner}", given.piece) if isinstance(given, FusedPiece) else f"{given}{inner}"
    if one.is_of_experts:
        return Row(native, (theirs,), Op((source,), f"{EXPERT_AXIS} {one.out_dim}{more}"), EXPERT_AXIS)
    return Row(native, (theirs,), Op((source,), f"{one.out_dim}{more}"), one.row.split if one.is_column else None)


def _dims(pattern: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\S+", pattern)


def _without_star(dim: str) -> str:
    axes = [axis for axis in dim.strip("()").split() if axis != STAR]
    return f"({' '.join(axes)})" if len(axes) > 1 else "".join(axes)
