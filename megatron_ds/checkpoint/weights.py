"""The weights of a live model as Hugging Face files, each rank writing its share of them.

A plan says which rank writes which tensors to which file. It follows from the model and the layout alone, so that all
ranks make the same one. Each tensor is gathered by the rank that writes it, over the tensor ranks of its stage; no rank
ever holds more than what it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import Any

import torch
from torch import Tensor

from megatron_ds.checkpoint.files import Entry
from megatron_ds.engine import Engine
from megatron_ds.engine.base import gather_shard
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.export import small_files
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.config import ADAPTER_WEIGHTS
from megatron_ds.hf.peft.export import adapter_files
from megatron_ds.hf.weight_files import SAFETENSORS, json_text
from megatron_ds.hf.weights import ToHF
from megatron_ds.layers.param_spec import ParamSpec, spec_of
from megatron_ds.parallel.grid import MODEL_AXES, ROLES, Layout

MAX_SHARD_BYTES = 5 * 10**9  # transformers' default
MIN_SHARE_BYTES = 2**26  # a small model is not scattered over many files

Inventory = Sequence[Sequence[tuple[str, ParamSpec, torch.dtype]]]


@dataclass(frozen=True)
class Shard:
    """A file of weights.

    Attributes:
        rank: who writes it.
        file: its name.
        natives: our names of what it is made of, in order.
        entries: the tensors in it, in order.
    """

    rank: int
    file: str
    natives: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)


def plan_shards(
    model: HFModel,
    inventory: Inventory,
    layout: Layout,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    min_share_bytes: int = MIN_SHARE_BYTES,
) -> list[Shard]:
    """Who writes what.

    Args:
        model: what the parameters are called and made of in Hugging Face's words.
        inventory: of each pipeline stage the parameters that it is the first to hold.
        layout: sizes of the grid.
        max_shard_bytes: of a file with more than one tensor.
        min_share_bytes: a stage's ranks share its weights as long as each has so many.
    """
    parts = []
    for stage, parameters in enumerate(inventory):
        groups = [_Group.of(model, names, dict(_dtypes(parameters))) for names in _connected(model, parameters)]
        parts += list(_divide(groups, _writers(stage, groups, layout, min_share_bytes), max_shard_bytes))
    count, shards = len(parts), []
    for number, (rank, groups) in enumerate(parts, start=1):
        file = SAFETENSORS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        natives = tuple(name for group in groups for name in group.natives)
        shards.append(Shard(rank, file, natives, tuple(entry for group in groups for entry in group.entries)))
    planned = {entry.name for shard in shards for entry in shard.entries}
    wanted = {name for row in model.table.values() for name in row.names}
    assert planned == wanted, planned ^ wanted
    return shards


@dataclass(frozen=True)
class _Group:
    """Parameters that a rank must have together, as parts of them are in one Hugging Face tensor."""

    natives: tuple[str, ...]
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, model: HFModel, natives: Sequence[str], dtypes: dict[str, torch.dtype]) -> _Group:
        found = ToHF(model).order(natives)
        return cls(tuple(natives), tuple(Entry(name, dtypes[natives[0]], shape) for name, shape in found))

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)


def _dtypes(parameters: Sequence[tuple[str, ParamSpec, torch.dtype]]) -> Iterator[tuple[str, torch.dtype]]:
    for name, _, dtype in parameters:
        yield name, dtype


def _connected(model: HFModel, parameters: Sequence[tuple[str, ParamSpec, torch.dtype]]) -> list[list[str]]:
    """Parameters that share a Hugging Face tensor, together; in order."""
    first: dict[str, str] = {}
    leader: dict[str, str] = {}
    for name, _, _ in parameters:
        shared = [first[theirs] for theirs in model.table[name].names if theirs in first]
        leader[name] = leader[shared[0]] if shared else name
        first.update(dict.fromkeys(model.table[name].names, name))
    position = {name: index for index, name in enumerate(leader)}
    ordered = sorted(leader, key=lambda name: position[leader[name]])
    return [list(names) for _, names in groupby(ordered, key=leader.__getitem__)]


def _writers(stage: int, groups: Sequence[_Group], layout: Layout, min_share_bytes: int) -> list[int]:
    """Ranks of a stage that share its weights: of other data ranks first, which are on other machines."""
    total = sum(group.bytes for group in groups)
    count = min(layout.world_size // layout.pipeline, max(1, total // min_share_bytes))
    replicas = [ranks for ranks in layout.peers(*ROLES["replica"]) if layout.coords(ranks[0]).pipeline == stage]
    return [rank for ranks in replicas for rank in ranks][:count]


def _divide(groups: Sequence[_Group], writers: Sequence[int], most: int) -> Iterator[tuple[int, list[_Group]]]:
    """Neighbours to each writer, about the same number of bytes, in files of at most `most` bytes."""
    share = ceil(sum(group.bytes for group in groups) / len(writers))
    before, open_rank, held, held_bytes = 0, writers[0], list[_Group](), 0
    for group in groups:
        rank = writers[min(before // max(1, share), len(writers) - 1)]
        if held and (rank != open_rank or held_bytes + group.bytes > most):
            yield open_rank, held
            held, held_bytes = [], 0
        open_rank = rank
        held.append(group)
        held_bytes += group.bytes
        before += group.bytes
    if held:
        yield open_rank, held


class ModelWeights:
    """A whole model: its ranks share the writing.

    Args:
        engine: what is written.
        model: what it is in Hugging Face's words.
        inventory: see `plan_shards`.
        model_path, tokenizer_path: where generation settings and the tokenizer are taken from.
    """

    def __init__(
        self, engine: Engine, model: HFModel, inventory: Inventory, model_path: str | None, tokenizer_path: str | None
    ) -> None:
        self._engine, self._model = engine, model
        self._paths = model_path, tokenizer_path
        self._dtype = str(inventory[0][0][2]).removeprefix("torch.")
        self.shards = plan_shards(model, inventory, engine.grid.layout)

    def files(self) -> dict[str, Sequence[Entry]]:
        """What this rank writes."""
        return {shard.file: shard.entries for shard in self.shards if shard.rank == self._engine.grid.rank}

    def pieces(self) -> Iterator[tuple[str, str, Tensor]]:
        """See `gather_weights`. Collective."""
        return gather_weights(self._engine, self._model, self.shards)

    def small_files(self) -> dict[str, bytes]:
        """All but the weights: path -> content."""
        found, index = small_files(self._model, self._dtype, *self._paths), index_of(self.shards)
        return found if index is None else {**found, f"{SAFETENSORS}.index.json": json_text(index).encode()}


class AdapterWeights:
    """Adapters alone, in the one file that peft reads, which the first rank writes: they are small.

    Args:
        engine: what is written.
        adapters: what they are in peft's words.
        inventory: of each pipeline stage the parameters that it is the first to hold.
        tokenizer_path: where the tokenizer is taken from.
    """

    def __init__(self, engine: Engine, adapters: Adapters, inventory: Inventory, tokenizer_path: str | None) -> None:
        self._engine, self._adapters, self._tokenizer_path = engine, adapters, tokenizer_path
        dtypes = {name: dtype for stage in inventory for name, _, dtype in stage if name in adapters.table}
        assert dtypes.keys() == adapters.table.keys(), dtypes.keys() ^ adapters.table.keys()
        (dtype,) = set(dtypes.values())
        self._entries = [Entry(theirs, dtype, shape) for theirs, shape in ToHF(adapters).order(dtypes)]

    def files(self) -> dict[str, Sequence[Entry]]:
        """What this rank writes."""
        return {ADAPTER_WEIGHTS: self._entries} if self._engine.grid.rank == 0 else {}

    def pieces(self) -> Iterator[tuple[str, str, Tensor]]:
        """(file, name, whole tensor) of what this rank writes. Collective over the world."""
        to_hf = ToHF(self._adapters)
        for name, whole in self._engine.full_parameters(self._adapters.table):
            if whole is not None:
                for theirs, tensor in to_hf.add(name, whole.to("cpu")):
                    yield ADAPTER_WEIGHTS, theirs, tensor

    def small_files(self) -> dict[str, bytes]:
        """All but the weights: path -> content."""
        return adapter_files(self._adapters, self._tokenizer_path)


def index_of(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The content of the index; None where there is one file."""
    if len(shards) == 1:
        return None
    entries = [entry for shard in shards for entry in shard.entries]
    metadata = {
        "total_parameters": sum(entry.bytes // entry.dtype.itemsize for entry in entries),
        "total_size": sum(entry.bytes for entry in entries),
    }
    return {"metadata": metadata, "weight_map": {e.name: shard.file for shard in shards for e in shard.entries}}


def gather_weights(engine: Engine, model: HFModel, shards: Sequence[Shard]) -> Iterator[tuple[str, str, Tensor]]:
    """(file, name, whole tensor) of what this rank writes, in order; a tensor is valid until the next is asked for.

    Collective over the ranks of a stage: each takes it to its end. Under ZeRO-3 one parameter at a time is gathered
    over the data ranks.
    """
    grid, parameters = engine.grid, dict(engine.local_parameters())
    to_hf = ToHF(model, reuse=True)
    same_replica = grid.layout.peers_of(grid.rank, *MODEL_AXES)
    for shard in shards:
        place = grid.layout.coords(shard.rank)
        if place.pipeline != grid.coords.pipeline:
            continue
        for name in shard.natives:
            with engine.gathered(parameters[name]):
                if shard.rank not in same_replica:
                    continue
                whole = gather_shard(parameters[name].detach(), spec_of(parameters[name]), grid, to=place.tensor)
                if whole is None or shard.rank != grid.rank:
                    continue
                for theirs, tensor in to_hf.add(name, whole.to("cpu")):
                    yield shard.file, theirs, tensor
