"""A Hugging Face directory's weights as native parameters, share by share; and the way back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import EMBEDDING, HEAD
from megatron_ds.hf.io import open_directory
from megatron_ds.layers.parameter import ParamSpec, pad_share

FLOATS = ("F64", "F32", "F16", "BF16")


class HFWeights:
    """Read native parameters out of a directory. Opening it accounts for every tensor; reading touches slices only.

    Args:
        directory: where the weights are.
        model: what its config says.

    Attributes:
        model: the model with `tied` settled by the bytes on disk, not by the config alone.

    Raises:
        ConversionError: no weights or damaged ones; a tensor that is missing, unexpected, misshapen or not floating.
    """

    def __init__(self, directory: str | Path, model: HFModel) -> None:
        self._source = open_directory(directory)
        self._names = frozenset(self._source.names)
        self._prefix = model.family.prefix
        self._bare = not any(name.startswith(self._prefix) for name in self._names)
        table = model.family.table(model.decoder)
        self._head = self.name_on_disk(table[HEAD].names[0])
        self._embedding = self.name_on_disk(table[EMBEDDING].names[0])
        self.model = model.with_tied(self._is_tied(model.decoder.tied))
        self._account()

    def share(self, name: str, spec: ParamSpec, rank: int, size: int) -> Tensor:
        """A tensor rank's share of one native parameter, in its dtype on disk, vocabulary padding included.

        Args:
            name: native name.
            spec: the parameter's declaration.
            rank, size: place on the tensor axis.
        """
        row, sizes = self.model.table[name], self.model.axis_sizes
        assert spec.shape == row.op.native_shape(sizes), (name, spec.shape, row.op.native_shape(sizes))
        assert spec.split_dim == row.op.split_dim(row.split), (name, spec.split_dim, row)
        start, stop = spec.local_range(rank, size)
        names = [self.name_on_disk(one) for one in row.names]
        reader = lambda source, at: self._source.read(names[source], at)  # noqa: E731
        if row.split is None or spec.split_dim is None:
            return row.op.read(reader, sizes, None, 0, 0)
        unit = spec.shape[spec.split_dim] // sizes[row.split]
        first, last = start // unit, -(-stop // unit)  # a share may end within a unit: in a group of query heads
        covering = row.op.read(reader, sizes, row.split, first, last)
        return pad_share(covering.narrow(spec.split_dim, start - first * unit, stop - start), spec, size)

    def whole(self, name: str) -> Tensor:
        """One whole native parameter, in its dtype on disk, without padding."""
        row = self.model.table[name]
        names = [self.name_on_disk(one) for one in row.names]
        return row.op.read(lambda source, at: self._source.read(names[source], at), self.model.axis_sizes, None, 0, 0)

    @property
    def num_params(self) -> int:
        """Of the whole model, tied ones once."""
        return sum(prod(row.op.native_shape(self.model.axis_sizes)) for row in self.model.table.values())

    def name_on_disk(self, name: str) -> str:
        """What a tensor is called in this directory, which may lack the base model's prefix."""
        return name.removeprefix(self._prefix) if self._bare else name

    def _is_tied(self, by_config: bool) -> bool:
        """Tied where the config says so, unless both tensors are there and differ."""
        if not by_config or not {self._head, self._embedding} <= self._names:
            return by_config
        return self._source.same_bytes(self._head, self._embedding)

    def _account(self) -> None:
        """Every tensor on disk is used, ignored by a rule, or refused; every parameter has its tensors."""
        where, family = self._source.directory, self.model.family
        wanted = {
            self.name_on_disk(name): row.op.source_shape(source, self.model.axis_sizes)
            for row in self.model.table.values()
            for source, name in enumerate(row.names)
        }
        missing = [name for name in wanted if name not in self._names]
        if missing:
            hint = "; set tie_word_embeddings to true in config.json if the head is the embedding"
            raise ConversionError(
                f"{where}: missing {_some(missing)}, which {family.model_type} with this config needs"
                f"{hint if missing == [self._head] else ''}"
            )
        alias = {self._head} if self.model.decoder.tied else set()
        unexpected = [
            name
            for name in sorted(self._names - wanted.keys() - alias)
            if not any(re.search(pattern, name) for pattern in family.ignored)
        ]
        if unexpected:
            raise ConversionError(
                f"{where}: unexpected {_some(unexpected)}, which {family.model_type} with this config does not have"
            )
        for name, shape in wanted.items():
            found, dtype = self._source.shape(name), self._source.dtype(name)
            if found != shape:
                raise ConversionError(f"{where}: {name} has shape {list(found)}, the config says {list(shape)}")
            if dtype not in FLOATS:
                raise ConversionError(
                    f"{where}: {name} is of type {dtype}; supported: {', '.join(FLOATS)} (no quantised weights)"
                )


class ToHF:
    """Whole native parameters -> Hugging Face tensors, one parameter at a time, in any order.

    A fused tensor is given when the last of its pieces has come, so that pieces should come near one another.
    """

    def __init__(self, model: HFModel) -> None:
        self.model = model
        self._missing = Counter(
            theirs for row in model.table.values() for source, theirs in enumerate(row.names) if row.op.is_piece(source)
        )
        self._assembled: dict[str, Tensor] = {}

    def add(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take one native parameter; gives the tensors that are complete with it. They may be views of it."""
        row, sizes = self.model.table[name], self.model.axis_sizes
        for source, (theirs, tensor) in enumerate(zip(row.names, row.op.write(whole, sizes))):
            if not row.op.is_piece(source):
                yield theirs, tensor
                continue
            if theirs not in self._assembled:
                self._assembled[theirs] = tensor.new_empty(row.op.source_shape(source, sizes))
            row.op.place(source, tensor, self._assembled[theirs], sizes)
            self._missing[theirs] -= 1
            if self._missing[theirs] == 0:
                yield theirs, self._assembled.pop(theirs)


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
