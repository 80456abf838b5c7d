"""Weights of a Hugging Face directory as native parameters, shard by shard. `to_hf.py` has the conversion back."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import reduce
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_ds.dtypes import DTYPE_OF_CODE
from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Part, Row
from megatron_ds.hf.label_classes import OF_HEAD
from megatron_ds.hf.sentence_modules import pooled
from megatron_ds.hf.tensor_mapping import Reader, Sizes
from megatron_ds.hf.tensor_names import (
    NamesError,
    equivalent_names,
    names_on_disk,
    refuse_adapter_tensors,
    some_names,
)
from megatron_ds.hf.to_hf import assert_each_once
from megatron_ds.hf.weight_files import TensorSource, open_directory
from megatron_ds.layers.param_spec import ParamSpec, is_untrained, pad_shard
from megatron_ds.log import log_once
from megatron_ds.parallel.grid import Axes


class RowsReader(Protocol):
    """A `Reader` that may be asked for some rows of a source, and decodes no others of a quantised one."""

    def __call__(self, source: int, rows: slice = ...) -> Tensor: ...


class HFWeights:
    """Reader of native parameters from a directory. Opening it accounts for every tensor; reading accesses only slices.

    Args:
        directory: directory with the weights.
        model: the model by its config.

    Attributes:
        model: the model with the heads that are on disk; the weights also decide whether the head is tied.
        new: native names of the parameters of a new head that are not on disk, or have another shape there.

    Raises:
        ConversionError: no weights or damaged ones; a tensor is missing, unexpected, of another shape or not floating.
    """

    def __init__(self, directory: str | Path, model: HFModel) -> None:
        source, problems = open_directory(directory), list[NamesError]()
        blocks = sum(stack.num_stored_blocks for stack in model.core.stacks.values())
        if blocks > len(source.names):  # before tables of that many names are made
            raise ConversionError(
                f"{directory}: {len(source.names)} tensors cannot be those of the {blocks:,} layers that config.json "
                "has; try the config.json of these weights"
            )
        if model.quantisation is not None:
            source = source.dequantised(model.quantisation)
        # what is passed through keeps its names, so the others must have theirs too
        for renamed in (source,) if model.family.passes_through else equivalent_names(source):
            for family in model.family.forms():
                try:
                    self._open(renamed, replace(model, family=family))
                except NamesError as problem:
                    problems.append(problem)
                else:
                    if renamed.renaming:
                        log_once(f"{directory}: tensor names are read {renamed.renaming}")
                    self._note_reading()
                    return
        refuse_adapter_tensors(source)
        raise min(problems, key=lambda problem: problem.misfits)

    def _open(self, source: TensorSource, model: HFModel) -> None:
        self._source, self._names = source, frozenset(source.names)
        model = replace(model, core=model.family.detect_heads(model.core, self._names))
        table = model.family.table(model.core)
        self._on_disk = names_on_disk(self._source, model.family, table)
        self._head = self.name_on_disk(table[HEAD].names[0]) if HEAD in table else None
        self._embedding = self.name_on_disk(table[EMBEDDING].names[0])
        if model.core.tied and self._embedding not in self._names and self._head in self._names:
            self._on_disk[table[EMBEDDING].names[0]] = self._embedding = self._head  # one of the two names was saved
        self.model = replace(
            model.with_tied(self._is_tied(model.core.tied, model.family)),
            passed_through=tuple(name for name in source.names if _matches(name, model.family.passes_through)),
        )
        self.new = self._new_parameters()
        assert_each_once(self.model.table)
        self._account()

    def shard(self, name: str, spec: ParamSpec, axes: Axes) -> Tensor:
        """Read a rank's shard of one native parameter, in its dtype on disk, vocabulary padding included.

        Args:
            name: native name.
            spec: the parameter's declaration.
            axes: those over which it may be divided.
        """
        row = self.model.table[name]
        if row.split is None and not spec.splits:
            return self.full(name)
        reader = self._reader(row, ahead=False)
        return read_shard(row, self.model.axis_sizes, reader, spec, axes, reader)

    def full(self, name: str, place: Tensor | None = None) -> Tensor:
        """Read one full native parameter, in its dtype on disk, without padding.

        Args:
            place: bytes that it may be copied to; None = new memory.
        """
        return self._full(self.model.table[name], place)

    def part(self, part: Part) -> Tensor:
        """Read one full native parameter, or one expert of it, in its dtype on disk, without padding."""
        return self._full(self.model.table[part.name].of(part.expert), None)

    def _full(self, row: Row, place: Tensor | None) -> Tensor:
        return row.op.read(self._reader(row, ahead=True), self.model.axis_sizes, place=place)

    def tensor(self, name: str) -> Tensor:
        """Map a Hugging Face tensor of the table, as it is on disk."""
        return self._source.tensor(self._on_disk[name])

    def each(self, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) of every native parameter in the order on disk; pieces of a tensor are adjacent.

        Parameters may share memory: use one before asking for the next. Fresh memory for each would cost as much as
        reading, because the kernel clears it first.

        Args:
            without: names of parameters that are left out.
        """
        for part, full in self._each(
            {Part(name): row for name, row in self._on_disk_rows.items() if name not in without}
        ):
            yield part.name, full

    def parts(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield as `each` does, but experts that are stored one by one as such, without the dim of the experts."""
        return self._each({part: row.of(part.expert) for row in self._on_disk_rows.values() for part in row.parts})

    def _each(self, rows: Mapping[Part, Row]) -> Iterator[tuple[Part, Tensor]]:
        position = {name: index for index, name in enumerate(self._source.names)}
        stacked = [row for row in rows.values() if len(row.names) > 1]
        place = torch.empty(max(map(self._size_bytes, stacked), default=0), dtype=torch.uint8)
        first = {part: min(position[self._on_disk[theirs]] for theirs in row.names) for part, row in rows.items()}
        for part in sorted(first, key=first.__getitem__):
            yield part, self._full(rows[part], place)

    def passed_through(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name on disk, tensor) of every tensor that exports have byte for byte, in the order on disk.

        Each is a view of its file, in its dtype there, which need not be a floating one.
        """
        return ((name, self._source.tensor(name, ahead=True)) for name in self.model.passed_through)

    def for_model(self, model: HFModel) -> HFWeights:
        """Return a reader of the same directory for a model that differs from its own in the tables of the vocabulary.

        An untied head is read from the embedding. Tables of another length are not read.
        """
        other = copy(self)
        other.model = model
        if self.model.core.tied and not model.core.tied and self._head is not None:
            other._on_disk = {**self._on_disk, model.table[HEAD].names[0]: self._embedding}
        return other

    def with_pooling(self) -> HFWeights:
        """Return a reader of the same model with the pooling that its directory has, if the model has no head.

        Raises:
            ConversionError: see `read_pooling`.
        """
        return self.for_model(replace(self.model, core=pooled(self.model.core, self.directory)))

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name of each tensor of the table -> its dtype on disk, or that in which it is decoded; without a new head."""
        names = {name for row in self._on_disk_rows.values() for name in row.names}
        return {name: DTYPE_OF_CODE[self._source.dtype(self._on_disk[name])] for name in names}

    @property
    def mixed_dtypes(self) -> dict[str, torch.dtype]:
        """The same if the tensors have several dtypes; empty if all have the same."""
        dtypes = self.dtypes
        return dtypes if len(set(dtypes.values())) > 1 else {}

    def rounded(self, part: Part, full: Tensor) -> Tensor:
        """Round a full parameter, or one expert of it, to the dtypes that its tensors have on disk.

        Returns:
            the values in a dtype that holds those of all its tensors.
        """
        row, sizes = self.model.table[part.name].of(part.expert), self.model.axis_sizes
        dtypes = [DTYPE_OF_CODE[self._source.dtype(self._on_disk[name])] for name in row.names]
        widest = reduce(torch.promote_types, dtypes)
        if len(set(dtypes)) == 1:
            return full.to(widest)
        found = full.to(widest, copy=True, memory_format=torch.contiguous_format)
        for source, dtype in enumerate(dtypes):
            slot = row.op.slot(source, found, sizes)
            slot.copy_(slot.to(dtype))
        return found

    @property
    def directory(self) -> Path:
        """The directory that is read."""
        return self._source.directory

    @property
    def files(self) -> list[Path]:
        """Files with the weights."""
        return self._source.files

    def files_of(self, names: Iterable[str]) -> list[Path]:
        """Return the files that these native parameters are read from."""
        rows = [row for name in names if (row := self._on_disk_rows.get(name)) is not None]
        return self._source.files_of(self._on_disk[theirs] for row in rows for theirs in row.names)

    @property
    def num_params(self) -> int:
        """Number of parameters of the full model, tied ones once; weights that are no parameters are not counted."""
        rows = (row for name, row in self.model.table.items() if not is_untrained(name))
        return sum(prod(row.op.native_shape(self.model.axis_sizes)) for row in rows)

    @property
    def source(self) -> TensorSource:
        """The tensors, by names of the family; see `equivalent_names`."""
        return self._source

    def name_on_disk(self, name: str) -> str:
        """Return a tensor's name in `source`, which may lack the base model's prefix or be an old name."""
        return self._on_disk[name]

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the tensors by names of the family, as views of the files; None if the files have them so."""
        if not (self._source.renaming or any(map(self._source.is_decoded, self._names))):
            return None
        return {name: self._source.tensor(name) for name in self._names}

    @property
    def _renaming(self) -> str:
        return f"; names were read {self._source.renaming}" if self._source.renaming else ""

    def _reader(self, row: Row, *, ahead: bool) -> RowsReader:
        last = dict[str, Tensor]()  # the tensor that was decoded last, as several sources may be pieces of it

        def read(source: int, rows: slice = slice(None)) -> Tensor:
            name = self._on_disk[row.names[source]]
            if not self._source.is_decoded(name):
                return self._source.tensor(name, ahead=ahead, rows=rows)
            if name not in last:
                last.clear()
                last[name] = self._source.tensor(name, ahead=ahead, rows=rows)
            return last[name]

        return read

    def _size_bytes(self, row: Row) -> int:
        widest = max(DTYPE_OF_CODE[self._source.dtype(self._on_disk[name])].itemsize for name in row.names)
        return prod(row.op.native_shape(self.model.axis_sizes)) * widest

    def _is_tied(self, by_config: bool, family: Family) -> bool:
        """Test whether the config or the family ties the head; not if head and embedding are on disk and differ."""
        tied = by_config or family.tied_by_bytes
        if self._head is None or not {self._head, self._embedding} <= self._names:
            return tied
        return tied and self._source.same_bytes(self._head, self._embedding)

    def _copies(self) -> set[str]:
        """Return the names on disk of copies of other tensors.

        Raises:
            ConversionError: a copy differs from the original.
        """
        found = {self._head} if self.model.core.tied and self._head is not None else set()
        for alias, name in self.model.family.aliases.items():
            original = self._on_disk.get(name)
            if alias not in self._names or alias == original or original not in self._names:
                continue
            if not self._source.same_bytes(alias, original):
                raise ConversionError(
                    f"{self._source.directory}: {alias} differs from {original}, but is its copy in "
                    f"{self.model.family.model_type}; two separate tables are not supported"
                )
            found.add(alias)
        return found

    @property
    def _on_disk_rows(self) -> dict[str, Row]:
        return {name: row for name, row in self.model.table.items() if name not in self.new}

    def _new_parameters(self) -> frozenset[str]:
        """Return the native names of a new head's parameters that cannot be read from disk."""
        if self.model.replaced is None:
            return frozenset()
        found = set()
        for name, row in self.model.table.items():
            shapes = [row.op.source_shape(source, self.model.axis_sizes) for source in range(len(row.names))]
            theirs = [self._on_disk[one] for one in row.names]
            fits = all(one in self._names and self._source.shape(one) == shape for one, shape in zip(theirs, shapes))
            if name.startswith(OF_HEAD) and not fits:
                found.add(name)
        return frozenset(found)

    def _replaced_tensors(self) -> set[str]:
        """Return the names on disk of the tensors of the head that a new one takes the place of."""
        own = self.model.replaced
        if own is None:
            return set()
        core = own.family.detect_heads(own.core, self._names)
        on_disk = names_on_disk(self._source, own.family, own.family.table(core))
        prefix = own.family.prefix
        unused = {form for name in own.family.unused_tensors(core) for form in (name, name.removeprefix(prefix))}
        return {*on_disk.values(), *own.family.aliases, *unused}

    def _unused_tensors(self) -> set[str]:
        """Return the names on disk of tensors that only other classes of the family use."""
        names, prefix = self.model.family.unused_tensors(self.model.core), self.model.family.prefix
        return {form for name in names for form in (name, name.removeprefix(prefix))}

    def _further_modules(self) -> list[str]:
        """Return the names on disk of weights of modules that are no part of the model here."""
        patterns = self.model.family.further_modules(self.model.config)
        return [name for name in self._source.names if _matches(name, patterns)]

    def _note_reading(self) -> None:
        """Log what is read in another form than it has on disk, and what is not read."""
        if any(map(self._source.is_decoded, self._names)):
            log_once(
                f"{self._source.directory}: weights in {self.model.quantisation} are read as bfloat16; exports are not "
                "quantised"
            )
        names = self._further_modules()
        if names:
            log_once(
                f"{self._source.directory}: {len(names)} tensors that predict further tokens (MTP), such as "
                f"{names[0]}, are not read; exports lack them and name no such layer"
            )

    def _account(self) -> None:
        """Check that every tensor on disk is used or ignored by a rule, and that every parameter has its tensors."""
        where, family = self._source.directory, self.model.family
        wanted = {
            self.name_on_disk(name): row.op.source_shape(source, self.model.axis_sizes)
            for row in self._on_disk_rows.values()
            for source, name in enumerate(row.names)
        }
        missing = [name for name in wanted if name not in self._names]
        if missing:
            hint = "; set tie_word_embeddings to true in config.json if the head is the embedding"
            raise NamesError(
                f"{where}: missing {some_names(missing)}, which {family.model_type} with this config needs"
                f"{hint if missing == [self._head] else ''}{self._renaming}",
                (len(missing) - len(wanted), len(missing), 0),
            )
        unexpected = [
            name
            for name in sorted(
                self._names
                - wanted.keys()
                - self._copies()
                - self._unused_tensors()
                - self._replaced_tensors()
                - set(self._further_modules())
            )
            if not _matches(name, (*family.ignored, *family.passes_through))
        ]
        if unexpected:
            raise NamesError(
                f"{where}: unexpected {some_names(unexpected)}, which {family.model_type} with this config does not "
                f"have{self._renaming}",
                (-len(wanted), 0, len(unexpected)),
            )
        if family.passes_through and not self.model.passed_through:
            raise NamesError(
                f"{where}: no tensor of the vision tower, which a {family.model_type} has; try a directory with all "
                "its weights",
                (-len(wanted), 1, 0),
            )
        for name, shape in wanted.items():
            found, dtype = self._source.shape(name), self._source.dtype(name)
            if found != shape:
                raise ConversionError(
                    f"{where}: {name} has shape {list(found)}, the config says {list(shape)}{self._renaming}"
                )
            if dtype not in DTYPE_OF_CODE:
                raise ConversionError(
                    f"{where}: {name} is of type {dtype}; supported: {', '.join(DTYPE_OF_CODE)} (no quantised weights)"
                )


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def read_shard(
    row: Row,
    sizes: Sizes,
    reader: Reader,
    spec: ParamSpec,
    axes: Axes,
    rows_reader: RowsReader | None = None,
) -> Tensor:
    """Read a rank's shard of one native parameter, padding included.

    Of the dim that the row's axis leads, nothing outside the shard is read.

    Args:
        row: the parameter's.
        sizes: of the named axes in it.
        reader: of its sources.
        spec: the parameter's declaration.
        axes: those over which it may be divided.
        rows_reader: of rows of its sources, which need not be decoded as a whole then; None = use `reader`.
    """
    dim, divided = row.op.split_dim(row.split), {split.dim for split in spec.splits}
    assert spec.shape == row.op.native_shape(sizes), (row, spec.shape, row.op.native_shape(sizes))
    assert dim in divided or (dim is None and not divided), (row, spec.splits)
    ranges = list(spec.local_ranges(axes))
    if row.split is None or dim is None:
        covering = row.op.read(reader, sizes)
    else:
        start, stop = ranges[dim]
        unit = spec.shape[dim] // sizes[row.split]
        first, last = start // unit, -(-stop // unit)  # a shard may end within a unit: in a group of query heads
        if rows_reader is not None and row.op.is_first_dim(row.split):
            rows = slice(first, last)
            covering = row.op.read(lambda source: rows_reader(source, rows), {**sizes, row.split: last - first})
        else:
            covering = row.op.read(reader, sizes, row.split, first, last)
        ranges[dim] = start - first * unit, stop - first * unit
    return pad_shard(covering[tuple(slice(*bounds) for bounds in ranges)], spec, axes)
