"""Modules that peft trains in full next to its adapters (`modules_to_save`), and base tensors in its files.

A file of peft may also hold an embedding and a head that replace those of the base: it saves them when the vocabulary
was resized. They are not trained by peft, and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.family import EMBEDDING, HEAD, Row
from megatron_ds.hf.tensor_mapping import Op


def saved_parameters(ends: Sequence[str], model: HFModel, where: str) -> frozenset[str]:
    """Return the native names of the parameters of the modules whose names end as `modules_to_save` says.

    Args:
        ends: ends of module names, matched as peft does.
        model: the base model; a tied head is a module of its own.
        where: prefix of error messages.

    Raises:
        ConversionError: nothing matches, or a module is only a part of a parameter here.
    """
    rows = model.family.table(model.core)
    saved = {native for native, row in rows.items() if any(map(_matcher(ends), row.names))}
    for end in ends:
        if not any(map(_matcher([end]), _names(rows.values()))):
            known = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in _names(rows.values())})
            raise ConversionError(
                f"{where}.modules_to_save={end} matches nothing in a {model.family.model_type}; supported: "
                f"{', '.join(known)}"
            )
    is_saved = _matcher(ends)
    for native in sorted(saved):
        others = [name for name in rows[native].names if not is_saved(name)]
        if others:
            raise ConversionError(
                f"{where}.modules_to_save leaves out {others[0]}, which is one parameter here with "
                f"{next(filter(is_saved, rows[native].names))}; save both or neither"
            )
    if EMBEDDING in saved and _has_copies(model):
        raise ConversionError(
            f"{where}.modules_to_save matches {rows[EMBEDDING].names[0]}, of which a {model.family.model_type} has "
            "copies that peft does not train; remove it"
        )
    return frozenset(saved)


def token_rows(given: Mapping[str, tuple[int, ...]], model: HFModel, where: str) -> dict[str, tuple[int, ...]]:
    """Return native name of a table -> its rows that peft's `trainable_token_indices` replaces.

    Args:
        given: end of a table's name -> rows; "" = the word embedding.
        model: the model; the rows of tied tables are given once, or twice in the same way.
        where: prefix of error messages.

    Raises:
        ConversionError: a name is no table, or tied tables have different rows.
    """
    rows, found = model.family.table(model.core), dict[str, tuple[int, ...]]()
    tables = {rows[native].names[0].removesuffix(".weight"): native for native in (EMBEDDING, HEAD) if native in rows}
    for end, indices in given.items():
        native = next((native for name, native in tables.items() if name.endswith(end)), None)
        if native is None:
            raise ConversionError(f"{where}.trainable_token_indices has {end}; supported: {', '.join(tables)}")
        stored = EMBEDDING if model.core.tied else native
        if found.setdefault(stored, indices) != indices:
            raise ConversionError(f"{where}.trainable_token_indices has different rows of tied tables")
    return found


def untied(model: HFModel, saved: frozenset[str], keeps_tied: bool) -> tuple[HFModel, frozenset[str]]:
    """Return the model that is trained and its parameters that are trained in full, as peft decides for tied tables.

    By default peft trains a copy of each saved module: a tied embedding and head become two tables.

    Args:
        model: the base model.
        saved: native names of parameters that are trained in full.
        keeps_tied: peft's `ensure_weight_tying`.
    """
    if not model.core.tied or not saved & {EMBEDDING, HEAD}:
        return model, saved
    if keeps_tied:
        return model, (saved | {EMBEDDING}) - {HEAD}
    return model.with_tied(False), saved


def with_vocabulary(model: HFModel, vocab_size: int) -> HFModel:
    """Return the same model with another number of tokens."""
    if vocab_size == model.core.vocab_size:
        return model
    config, on_disk = deepcopy(model.config), deepcopy(dict(model.on_disk))
    getattr(config, "text_config", config).vocab_size = vocab_size
    for fields in (on_disk, on_disk.get("text_config")):
        if isinstance(fields, dict) and fields.get("vocab_size") == model.core.vocab_size:
            fields["vocab_size"] = vocab_size
    return replace(model, config=config, core=replace(model.core, vocab_size=vocab_size), on_disk=on_disk)


def rows_of(natives: Iterable[str], model: HFModel, prefix: str) -> Iterator[Row]:
    """Yield the rows of base parameters in a file of peft, where a tied head is a copy of its embedding."""
    for native in natives:
        row = model.table[native]
        copies = [head_name(model)] if native == EMBEDDING and model.core.tied else []
        names, others = ([f"{prefix}{name}" for name in some if name is not None] for some in (row.names, copies))
        yield replace(row, names=tuple(names), copies=tuple(others))


def token_row(native: str, num_rows: int, model: HFModel, prefix: str) -> Row:
    """Return the row of replaced rows of a table, (num_rows, e)."""
    module = model.table[native].names[0].removesuffix(".weight")
    pattern = f"t{num_rows} e"
    name = f"{prefix}{module}.token_adapter.trainable_tokens_delta"
    return Row(f"{native}.token_rows", (name,), Op((pattern,), pattern))


def head_name(model: HFModel) -> str | None:
    """Return the name of the head's weight, tied or not; None = it has none of its own."""
    row = model.family.table(model.core).get(HEAD)
    return row.names[0] if row is not None else None


def _matcher(ends: Sequence[str]) -> Callable[[str], bool]:
    """Return a function from a tensor's name to whether it is in a module whose name ends with one of `ends`."""

    def is_in(name: str) -> bool:
        return any(module.endswith(tuple(ends)) for module in _modules(name))

    return is_in


def _modules(name: str) -> Iterator[str]:
    """Yield the names of the modules that a tensor is in: of its own, and of those around it."""
    parts = name.split(".")[:-1]
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _names(rows: Iterable[Row]) -> Iterator[str]:
    return (name for row in rows for name in row.names)


def _has_copies(model: HFModel) -> bool:
    """Test whether transformers has the embedding under several names."""
    (name,) = model.family.table(model.core)[EMBEDDING].names
    return name in model.family.aliases.values()
