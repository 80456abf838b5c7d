"""Names of tensors in a directory: those of the family's table, without the base model's prefix, old, or wrapped.

A wrapper or a larger model puts its own names around those of the family: torch.compile, DistributedDataParallel, FSDP,
DeepSpeed, Lightning, peft, or a model of text and images. They are left out if the family's table then fits completely.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile

from megatron_ds.errors import ConversionError
from megatron_ds.hf.family import Family, Row
from megatron_ds.hf.weight_files import TensorSource

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Names that torch and its libraries put anywhere into the names of a module's tensors."""

TEXT_MODELS = ("language_model", "text_model")
"""Names of the text model in a model of text and images."""

_NO_FIT = (1, 0, 0)
_OF_ADAPTERS = re.compile(r"\.(lora_[A-Za-z_]+|ia3_l|base_layer|original_module|modules_to_save)\b")


class NamesError(ConversionError):
    """The tensors of a directory are not those of a family's table.

    Attributes:
        misfits: minus the number of tensors that fit, that of missing and that of unexpected ones; the names with the
            least are those that the directory is meant to have.
    """

    def __init__(self, message: str, misfits: tuple[int, int, int]) -> None:
        super().__init__(message)
        self.misfits = misfits


def equivalent_names(source: TensorSource) -> Iterator[TensorSource]:
    """Yield the tensors by the names in the files, then by others that leave out more and more of them.

    Raises:
        ConversionError: two different tensors would get the same name.
    """
    yield source
    for short, renaming in shorter_names(source.names, [name for name in source.names if source.shape(name)]):
        yield source.renamed(short, renaming)


def shorter_names(names: Sequence[str], weights: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    """Yield mappings of names to shorter ones, with a text on what they leave out; the least comes first.

    Args:
        names: all names.
        weights: those that decide which parts all names share.
    """
    seen = [list(names)]
    for left_out, shorten in _SHORTER.items():
        inner = {name: shorten(name) for name in names}
        shared = _shared_parts([inner[name] for name in weights])
        for count in range(len(shared) + 1):
            prefix = "".join(f"{part}." for part in shared[:count])
            short = {name: one.removeprefix(prefix) for name, one in inner.items()}
            if list(short.values()) not in seen:
                seen.append(list(short.values()))
                parts = [part for part in left_out if any(part in name.split(".") for name in names)]
                texts = [f"'{part}.'" for part in parts] + [f"'{prefix}'"] * bool(prefix)
                yield short, f"without {' and '.join(texts)}"


def _shared_parts(names: list[str]) -> list[str]:
    """Return the first parts that all names share, without the last one of each."""
    columns = zip(*(name.split(".")[:-1] for name in names))
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _without(parts: tuple[str, ...]) -> Callable[[str], str]:
    """Return a function that leaves parts out of a name."""
    return lambda name: ".".join(part for part in name.split(".") if part not in parts)


_SHORTER = {
    WRAPPERS: _without(WRAPPERS),
    (*WRAPPERS, *TEXT_MODELS): _without((*WRAPPERS, *TEXT_MODELS)),
    # transformers 5.10 to 5.23 wrote model.language_model.model
    (*WRAPPERS, *TEXT_MODELS, "model"): lambda name: re.sub(
        r"^(model\.)+", "model.", _without((*WRAPPERS, *TEXT_MODELS))(name)
    ),
}


def refuse_adapter_tensors(source: TensorSource) -> None:
    """Refuse a directory of weights among which adapters are left.

    Raises:
        ConversionError: there is a tensor of an adapter.
    """
    found = next((name for name in source.names if _OF_ADAPTERS.search(name)), None)
    if found is not None:
        raise ConversionError(
            f"{source.directory}: {found} is of an adapter that is not merged into the model; try peft's "
            "merge_and_unload, or the base model as model.path and a directory of adapters as peft"
        )


def names_on_disk(source: TensorSource, family: Family, table: Mapping[str, Row]) -> dict[str, str]:
    """Return name in the table -> name on disk, which may lack the base model's prefix or be an old name.

    The table of a base model has no prefix, but the names on disk may have it.

    Raises:
        NamesError: some names have the prefix and others do not, or a tensor has both an old and a new name.
    """
    names, prefix = set(source.names), family.prefix
    is_norm = {name: "norm" in row.native for row in table.values() for name in row.names}
    is_base = not any(name.startswith(prefix) for name in is_norm)

    def found(name: str, norm: bool) -> str | None:
        old = _old_norm_name(name) if norm else name
        if old != name and {old, name} <= names:
            raise NamesError(f"{source.directory}: {name} is there twice, also by its old name {old}", _NO_FIT)
        return old if old in names else name if name in names else None

    as_in_table = {name: found(prefix + name if is_base else name, norm) for name, norm in is_norm.items()}
    copies = {name: alias for alias, name in family.aliases.items() if alias in names}
    if not prefix:
        return {name: here or copies.get(name, name) for name, here in as_in_table.items()}
    bare = {
        name: found(name.removeprefix(prefix), norm)
        for name, norm in is_norm.items()
        if is_base or name.startswith(prefix)
    }
    with_prefix = [here for name, here in as_in_table.items() if here and name in bare]
    without = [here for here in bare.values() if here]
    if with_prefix and without:
        raise NamesError(
            f"{source.directory}: {with_prefix[0]} has the prefix {prefix!r} and {without[0]} has not; expected all or "
            "none to have it",
            _NO_FIT,
        )
    return {
        name: (bare.get(name, here) or copies.get(name, name.removeprefix(prefix)))
        if without
        else here or copies.get(name, name)
        for name, here in as_in_table.items()
    }


def _old_norm_name(name: str) -> str:
    """Return the name of a norm's tensor in old saves from TensorFlow."""
    return re.sub(r"\.weight$", ".gamma", re.sub(r"\.bias$", ".beta", name))


def some_names(names: list[str], most: int = 3) -> str:
    """Return the first names and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
