"""Frozen parameters: patterns of Hugging Face tensor names -> native parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_ds.errors import ConfigError, nearest_names
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import Row
from megatron_ds.hf.spread_mapping import Spread


def frozen_parameters(model: HFModel, patterns: Sequence[str]) -> frozenset[str]:
    """Return the native names of the parameters whose Hugging Face tensors all match a pattern of `train.freeze`.

    Raises:
        ConfigError: a pattern matches nothing, only some tensors of a parameter, or the full model.
    """
    names = [name for row in model.table.values() for name in row.names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = " or ".join(nearest_names(pattern, names) or names[:2])
            raise ConfigError(f"train.freeze={pattern} matches no tensor of the model, such as {near}")
    frozen = set()
    for native, row in model.table.items():
        matched = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in row.names]
        if any(matched) and not all(matched):
            both = f"{row.names[matched.index(True)]} and {row.names[matched.index(False)]}"
            if isinstance(row.op, Spread):
                each = "experts" if row.split == "x" else "heads"
                raise ConfigError(
                    f"train.freeze matches only one of {both}, and all {each} of a layer are one parameter here; "
                    f"nearest: {' and '.join(_of_each(row, row.op))}"
                )
            raise ConfigError(f"train.freeze: {both} are one parameter here; freeze both or neither")
        if all(matched):
            frozen.add(native)
    if len(frozen) == len(model.table):
        raise ConfigError("train.freeze matches every tensor of the model; leave some to train")
    return frozenset(frozen)


def _of_each(row: Row, op: Spread) -> list[str]:
    """Return patterns of the names of the tensors of all experts or heads, one for each tensor of the first."""
    of_first = (name.rpartition(".0.") for name in row.names[: len(op.one.sources)])
    return [f"{start}.*.{end}" for start, _, end in of_first]
