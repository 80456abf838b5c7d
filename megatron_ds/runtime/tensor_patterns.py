"""Patterns of Hugging Face tensor names, in order, assigned to native parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_ds.errors import ConfigError, nearest_names
from megatron_ds.hf.family import Row
from megatron_ds.hf.spread_mapping import Spread


@dataclass(frozen=True)
class PatternKey:
    """The run file's key with the patterns, for messages.

    Attributes:
        name: such as `train.freeze`.
        fix: what to do with tensors that are one parameter, such as `freeze both or neither`.
        tensors: description of the tensors that a pattern may match.
    """

    name: str
    fix: str
    tensors: str = "tensor of the model"


def assign_parameters(
    table: Mapping[str, Row], entries: Sequence[Sequence[str]], key: PatternKey, entry_name: str = ""
) -> dict[str, int]:
    """Return native name -> index of the first entry with a pattern that matches its Hugging Face tensors.

    Parameters that no entry matches are left out.

    Args:
        table: native name -> row, of the parameters that may be matched.
        entries: patterns, as `fnmatch` takes them, of each entry.
        key: the run file's key.
        entry_name: suffix of the key for one entry, with a place for its index, such as `[{}].match`.

    Raises:
        ConfigError: a pattern matches nothing, or entries divide the tensors of a parameter.
    """
    names = [name for row in table.values() for name in row.names]
    for index, patterns in enumerate(entries):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = " or ".join(nearest_names(pattern, names) or names[:2])
                where = f"{key.name}{entry_name.format(index)}={pattern}"
                raise ConfigError(f"{where} matches no {key.tensors}, such as {near}")
    assigned = {}
    for native, row in table.items():
        found = [_first_match(name, entries) for name in row.names]
        if len(set(found)) > 1:
            raise ConfigError(_describe_division(row, found, key))
        if found[0] is not None:
            assigned[native] = found[0]
    return assigned


def _first_match(name: str, entries: Sequence[Sequence[str]]) -> int | None:
    matches = (any(fnmatchcase(name, pattern) for pattern in patterns) for patterns in entries)
    return next((index for index, matched in enumerate(matches) if matched), None)


def _describe_division(row: Row, found: Sequence[int | None], key: PatternKey) -> str:
    """Return the message for tensors of one parameter that different entries match."""
    matched = next(place for place, entry in enumerate(found) if entry is not None)
    other = next(place for place, entry in enumerate(found) if entry != found[matched])
    both = f"{row.names[matched]} and {row.names[other]}"
    if isinstance(row.op, Spread):
        each = "experts" if row.split == "x" else "heads"
        return (
            f"{key.name} matches only one of {both}, and all {each} of a layer are one parameter here; "
            f"nearest: {' and '.join(_of_each(row, row.op))}"
        )
    return f"{key.name}: {both} are one parameter here; {key.fix}"


def _of_each(row: Row, op: Spread) -> list[str]:
    """Return patterns of the names of the tensors of all experts or heads, one for each tensor of the first."""
    of_first = (name.rpartition(".0.") for name in row.names[: len(op.one.sources)])
    return [f"{start}.*.{end}" for start, _, end in of_first]
