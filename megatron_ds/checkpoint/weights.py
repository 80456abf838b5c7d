"""The weights of a live model as Hugging Face files, of which each rank writes some.

A plan assigns tensors to files and files to ranks. It follows from the model and the layout alone, so that all ranks
make the same one. Each tensor is gathered by the rank that writes it, over the model axes of its stage; no rank ever
holds more than what it writes. Experts that are stored one by one are planned and gathered one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_ds.checkpoint.files import TensorHeader
from megatron_ds.checkpoint.passed_through import PASSED_THROUGH, PassedThrough
from megatron_ds.checkpoint.wide_weights import WeightSource, WideWeights, live_dtypes
from megatron_ds.engine import Engine
from megatron_ds.engine.gathering import gather_part
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.export import small_files
from megatron_ds.hf.family import Part
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.config import ADAPTER_WEIGHTS
from megatron_ds.hf.peft.export import adapter_files
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weight_files import SAFETENSORS, json_text
from megatron_ds.layers.param_spec import ParamSpec, spec_of
from megatron_ds.parallel.grid import EXPERT, MODEL_AXES, ROLES, Layout

MAX_FILE_BYTES = 5 * 10**9  # transformers' default
MIN_RANK_BYTES = 2**26  # a small model is not scattered over many files

Inventory = Sequence[Sequence[tuple[str, ParamSpec, torch.dtype]]]


@dataclass(frozen=True)
class WeightFile:
    """A planned file of weights.

    Attributes:
        rank: the rank that writes it.
        file: its name.
        parts: the parameters, or experts of them, that its tensors are made of, in order.
        headers: of its tensors, in order.
    """

    rank: int
    file: str
    parts: tuple[Part, ...]
    headers: tuple[TensorHeader, ...]

    @property
    def bytes(self) -> int:
        return sum(header.bytes for header in self.headers)


def plan_files(
    model: HFModel,
    inventory: Inventory,
    layout: Layout,
    max_file_bytes: int = MAX_FILE_BYTES,
    min_rank_bytes: int = MIN_RANK_BYTES,
    wider: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> list[WeightFile]:
    """Assign tensors to files and files to ranks.

    Args:
        model: names and composition of the Hugging Face tensors.
        inventory: for each pipeline stage the parameters that it is the first to hold.
        layout: sizes of the grid.
        max_file_bytes: upper bound on a file with more than one tensor.
        min_rank_bytes: the ranks of a stage divide its weights as long as each has so many bytes.
        wider: Hugging Face name -> dtype, of tensors that are not written in that of their parameter.
    """
    planned, to_hf = [], ToHF(model)
    for stage, parameters in enumerate(inventory):
        dtypes = {name: dtype for name, _, dtype in parameters}
        groups = [_Group.of(to_hf, parts, dtypes[parts[0].name], wider) for parts in _connected(model, dtypes)]
        planned += list(_divide(groups, _writers(stage, groups, layout, min_rank_bytes), max_file_bytes))
    count, files = len(planned), []
    for number, (rank, groups) in enumerate(planned, start=1):
        file = (
            SAFETENSORS if count == 1 and not model.passed_through else f"model-{number:05d}-of-{count:05d}.safetensors"
        )
        parts = tuple(part for group in groups for part in group.parts)
        files.append(WeightFile(rank, file, parts, tuple(header for group in groups for header in group.headers)))
    names = {header.name for file in files for header in file.headers}
    wanted = {name for row in model.table.values() for name in row.names}
    assert names == wanted, names ^ wanted
    return files


@dataclass(frozen=True)
class _Group:
    """Parts that one rank must write, as pieces of them are in one Hugging Face tensor."""

    parts: tuple[Part, ...]
    headers: tuple[TensorHeader, ...]

    @classmethod
    def of(cls, to_hf: ToHF, parts: Sequence[Part], dtype: torch.dtype, wider: Mapping[str, torch.dtype]) -> _Group:
        order = to_hf.order(parts)
        return cls(tuple(parts), tuple(TensorHeader(name, wider.get(name, dtype), shape) for name, shape in order))

    @cached_property
    def bytes(self) -> int:
        return sum(header.bytes for header in self.headers)


def _connected(model: HFModel, names: Iterable[str]) -> list[list[Part]]:
    """Return groups of parts of parameters that have a Hugging Face tensor in common, in order."""
    first: dict[str, Part] = {}
    leader: dict[Part, Part] = {}
    for part in (part for name in names for part in model.table[name].parts):
        hf_names = model.table[part.name].of(part.expert).names
        shared = [first[hf_name] for hf_name in hf_names if hf_name in first]
        leader[part] = leader[shared[0]] if shared else part
        first.update(dict.fromkeys(hf_names, part))
    position = {part: index for index, part in enumerate(leader)}
    ordered = sorted(leader, key=lambda part: position[leader[part]])
    return [list(parts) for _, parts in groupby(ordered, key=leader.__getitem__)]


def _writers(stage: int, groups: Sequence[_Group], layout: Layout, min_rank_bytes: int) -> list[int]:
    """Return the ranks of a stage that write its weights: other replicas first, which are on other machines."""
    total = sum(group.bytes for group in groups)
    replicas = [ranks for ranks in layout.peers(*ROLES["replica"]) if layout.coords(ranks[0]).pipeline == stage]
    ranks = [rank for ranks in replicas for rank in ranks]
    return ranks[: max(1, total // min_rank_bytes)]


def _divide(groups: Sequence[_Group], writers: Sequence[int], most: int) -> Iterator[tuple[int, list[_Group]]]:
    """Yield consecutive groups for each writer, about the same number of bytes, in files of at most `most` bytes."""
    per_writer = ceil(sum(group.bytes for group in groups) / len(writers))
    before, open_rank, held, held_bytes = 0, writers[0], list[_Group](), 0
    for group in groups:
        rank = writers[min(before // max(1, per_writer), len(writers) - 1)]
        if held and (rank != open_rank or held_bytes + group.bytes > most):
            yield open_rank, held
            held, held_bytes = [], 0
        open_rank = rank
        held.append(group)
        held_bytes += group.bytes
        before += group.bytes
    if held:
        yield open_rank, held


class ModelWriter:
    """The weight files of a complete model, which its ranks divide among themselves.

    Args:
        engine: the live model.
        model: its Hugging Face names and config.
        inventory: see `plan_files`.
        source: the weights that the run began with, and what is not trained of them.
        model_path, tokenizer_path: the sources of generation settings and tokenizer files.
    """

    def __init__(
        self,
        engine: Engine,
        model: HFModel,
        inventory: Inventory,
        source: WeightSource,
        model_path: str | None,
        tokenizer_path: str | None,
    ) -> None:
        self._engine, self._model = engine, model
        self._paths = model_path, tokenizer_path
        self._dtype = str(inventory[0][0][2]).removeprefix("torch.")
        self._wide = WideWeights(engine, source, live_dtypes(inventory))
        self._plan = plan_files(model, inventory, engine.grid.layout, wider=self._wide.dtypes)
        self.passed_through: PassedThrough | None = None
        if model.passed_through:
            assert source.weights is not None, "its tensors are passed through from nowhere"
            self.passed_through = PassedThrough(source.weights)

    def files(self) -> dict[str, Sequence[TensorHeader]]:
        """Return the files that this rank writes."""
        return {file.file: file.headers for file in self._plan if file.rank == self._engine.grid.rank}

    def chunks(self, *, keeps_values: bool = False) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the tensors of these files; see `gather_weights`. Collective over the ranks of a stage."""
        return gather_weights(self._engine, self._model, self._plan, self._wide, keeps_values=keeps_values)

    def small_files(self) -> dict[str, bytes]:
        """Return path -> content of all other files."""
        found = small_files(self._model, self._dtype, *self._paths)
        others = self.passed_through.headers if self.passed_through is not None else ()
        index = index_of(self._plan, others)
        return found if index is None else {**found, f"{SAFETENSORS}.index.json": json_text(index).encode()}


class AdapterWriter:
    """The weight file of adapters alone, the one that peft reads; rank 0 writes it, as adapters are small.

    Args:
        engine: the live model.
        adapters: the adapters' names and config for peft.
        inventory: for each pipeline stage the parameters that it is the first to hold.
        tokenizer_path: the source of the tokenizer files.
    """

    passed_through: PassedThrough | None = None  # it is the base's

    def __init__(self, engine: Engine, adapters: Adapters, inventory: Inventory, tokenizer_path: str | None) -> None:
        self._engine, self._adapters, self._tokenizer_path = engine, adapters, tokenizer_path
        dtypes = {name: dtype for stage in inventory for name, _, dtype in stage if name in adapters.table}
        assert dtypes.keys() == adapters.table.keys(), dtypes.keys() ^ adapters.table.keys()
        (dtype,) = set(dtypes.values())
        self._headers = [
            TensorHeader(hf_name, dtype, shape) for hf_name, shape in ToHF(adapters).order(map(Part, dtypes))
        ]

    def files(self) -> dict[str, Sequence[TensorHeader]]:
        """Return the files that this rank writes."""
        return {ADAPTER_WEIGHTS: self._headers} if self._engine.grid.rank == 0 else {}

    def chunks(self, *, keeps_values: bool = False) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (file, name, full tensor) of what this rank writes. Collective over the world.

        Args:
            keeps_values: as in `gather_weights`; these tensors always do.
        """
        to_hf = ToHF(self._adapters)
        for name, full in self._engine.full_parameters(self._adapters.table):
            if full is not None:
                for hf_name, tensor in to_hf.add(name, full):
                    yield ADAPTER_WEIGHTS, hf_name, tensor

    def small_files(self) -> dict[str, bytes]:
        """Return path -> content of all other files."""
        return adapter_files(self._adapters, self._tokenizer_path)


def index_of(files: Sequence[WeightFile], passed_through: Sequence[TensorHeader] = ()) -> dict[str, Any] | None:
    """Return the content of the index; None if there is one file.

    Args:
        files: from `plan_files`.
        passed_through: the tensors of `passed_through.FILE`.
    """
    if len(files) == 1 and not passed_through:
        return None
    places = [(header, file.file) for file in files for header in file.headers]
    places += [(header, PASSED_THROUGH) for header in passed_through]
    headers = [header for header, _ in places]
    metadata = {
        "total_parameters": sum(header.bytes // header.dtype.itemsize for header in headers),
        "total_size": sum(header.bytes for header in headers),
    }
    return {"metadata": metadata, "weight_map": {header.name: file for header, file in places}}


def gather_weights(
    engine: Engine,
    model: HFModel,
    files: Sequence[WeightFile],
    wide: WideWeights | None = None,
    *,
    keeps_values: bool = False,
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (file, name, full tensor) of what this rank writes, in order. Collective over the ranks of a stage.

    Tensors are on the engine's device. Every rank iterates to the end. Under ZeRO-3 one parameter at a time is gathered
    over the shard group. Of experts that are stored one by one, a rank holds its shard and one more.

    Args:
        engine: the live model.
        model: its Hugging Face names.
        files: from `plan_files`.
        wide: the parameters that are written in a wider dtype; their masters are summed over the shard group.
        keeps_values: whether a tensor keeps its values, until training changes the weights. Otherwise it is valid until
            the next is asked for, and on a CPU memory is used again.
    """
    grid, parameters = engine.grid, dict(engine.local_parameters())
    to_hf = ToHF(model, reuse=not keeps_values and engine.device.type == "cpu")
    same_replica = grid.layout.peers_of(grid.rank, *MODEL_AXES)
    for file in files:
        writer = grid.layout.coords(file.rank)
        if writer.pipeline != grid.coords.pipeline:
            continue
        dtypes = {header.name: header.dtype for header in file.headers}
        for name, parts in groupby(file.parts, key=lambda part: part.name):
            master = wide.masters[name](parameters[name]) if wide is not None and name in wide.masters else None
            with engine.gathered(parameters[name]):
                spec = spec_of(parameters[name])
                holders = grid.expert.ranks if spec.is_of_experts else same_replica
                if file.rank not in holders:
                    continue
                to = {EXPERT: holders.index(file.rank)} if spec.is_of_experts else writer
                shard = parameters[name].detach() if master is None else master
                for part in parts:
                    full = gather_part(shard, spec, grid.model_axes, part.expert, to)
                    if full is None or file.rank != grid.rank:
                        continue
                    exact = wide.from_source(part) if wide is not None else None
                    for hf_name, tensor in to_hf.add(name, full if exact is None else exact, part.expert):
                        yield file.file, hf_name, tensor.to(dtypes[hf_name])
