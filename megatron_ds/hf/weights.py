"""A Hugging Face directory's weights as native parameters, share by share; and the way back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import LAYER, Row, axis_sizes
from megatron_ds.hf.io import open_directory, same_bytes
from megatron_ds.layers.parameter import ParamSpec, pad_share

HEAD = "head.weight"
EMBEDDING = "embedding.weight"


def table(model: HFModel) -> dict[str, Row]:
    """Native name -> row, one a parameter, layers written out; no head where it is tied."""
    expanded = {}
    for row in model.family.rows(model.decoder):
        layers = range(model.decoder.num_layers) if LAYER in row.native else range(1)
        for layer in layers:
            one = row.at(layer)
            expanded[one.native] = one
    if model.decoder.tied:
        del expanded[HEAD]
    return expanded


class HFWeights:
    """Read native parameters out of a directory. Opening it accounts for every tensor; reading touches slices only.

    Attributes:
        model: the model with `tied` settled by the bytes on disk, not by the config.
    """

    def __init__(self, directory: str | Path, model: HFModel) -> None:
        self._source = open_directory(directory)
        self._prefix = model.family.prefix
        self._bare = not any(name.startswith(self._prefix) for name in self._source.names)
        self.model = model.with_tied(self._is_tied(model))
        self.sizes = axis_sizes(self.model.decoder)
        self._rows = table(self.model)
        self._account()

    def share(self, name: str, spec: ParamSpec, rank: int, size: int) -> Tensor:
        """A rank's share of one native parameter, in its dtype on disk, vocabulary padding included."""
        row = self._rows[name]
        start, stop = spec.local_range(rank, size)
        axis = row.split
        if axis is not None and spec.split_dim is not None:
            unit = spec.shape[spec.split_dim] // self.sizes[axis]
            start, stop = start // unit, stop // unit
        names = [self._on_disk(one) for one in row.names]
        share = row.op.read(lambda source, at: self._source.read(names[source], at), self.sizes, axis, start, stop)
        return pad_share(share, spec, size)

    def _on_disk(self, name: str) -> str:
        return name.removeprefix(self._prefix) if self._bare else name

    def _is_tied(self, model: HFModel) -> bool:
        head = self._on_disk(_source_name(model, HEAD))
        embedding = self._on_disk(_source_name(model, EMBEDDING))
        names = set(self._source.names)
        if head not in names or embedding not in names:
            return model.decoder.tied
        return model.decoder.tied and same_bytes(self._source, head, embedding)

    def _account(self) -> None:
        """Every tensor on disk is used, ignored by a rule, or refused; every parameter has its tensors."""
        where = self._source.directory
        present = set(self._source.names)
        wanted: dict[str, tuple[int, ...]] = {}
        for row in self._rows.values():
            for index, name in enumerate(row.names):
                wanted[self._on_disk(name)] = row.op.source_shape(index, self.sizes)
        missing = [name for name in wanted if name not in present]
        if missing:
            raise ConversionError(f"{where}: {_some(missing)} missing; {self.model.family.model_type} needs it")
        ignored = [re.compile(pattern) for pattern in self.model.family.ignored]
        alias = {self._on_disk(_source_name(self.model, HEAD))} if self.model.decoder.tied else set()
        unexpected = [
            name
            for name in sorted(present - wanted.keys() - alias)
            if not any(pattern.search(name) for pattern in ignored)
        ]
        if unexpected:
            raise ConversionError(
                f"{where}: {_some(unexpected)} unexpected; {self.model.family.model_type} with this config has no "
                f"such tensor"
            )
        for name, shape in wanted.items():
            found = self._source.shape(name)
            if found != shape:
                raise ConversionError(f"{where}: {name} has shape {list(found)}, the config says {list(shape)}")


def to_hf(model: HFModel, name: str, whole: Tensor) -> Iterable[tuple[str, Tensor]]:
    """A whole native parameter -> its Hugging Face tensors by name."""
    row = table(model)[name]
    return zip(row.names, row.op.write(whole, axis_sizes(model.decoder)))


def _source_name(model: HFModel, native: str) -> str:
    return next(row.names[0] for row in model.family.rows(model.decoder) if row.native == native)


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{shown}{more} {verb}"
