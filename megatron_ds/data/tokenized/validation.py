"""Checks of examples of token ids that all kinds of models share."""

import difflib
import re
from collections.abc import Sequence

import numpy as np

from megatron_ds.columns import NEXT_SENTENCE_LABEL, TARGETS, Column, find_column
from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError

MASKED_MODELS, SEQ2SEQ_MODELS = "BERT-like", "encoder-decoder"
_OTHER_MODELS = {
    "token_type_ids": MASKED_MODELS,
    "next_sentence_label": MASKED_MODELS,
    "decoder_input_ids": SEQ2SEQ_MODELS,
    "decoder_attention_mask": SEQ2SEQ_MODELS,
}

FIELDS = ("input_ids", "labels", "attention_mask", "position_ids", *_OTHER_MODELS)
"""Columns of an example, of any kind of model."""

_BYPRODUCTS = ("special_tokens_mask", "overflow_to_sample_mapping")  # of tokenizers, which no model reads
_MEANT = re.compile(r"(^|_)(ids|labels?|masks?|positions?|targets?|weights?)(_|$)")

Example = dict[str, np.ndarray]
"""The checked columns of an example: (L,) int64 ids, (L,) bool masks, () int64 labels; L varies."""


def declared(name: str) -> Column:
    """Return the declaration of an example's column; `labels` become `targets`."""
    return TARGETS if name == "labels" else find_column(name)


def read_columns(located: Located, known: Sequence[str], kind: str) -> Example:
    """Return the columns of an example that are not null, in the order of `known`; unrelated columns are ignored.

    Args:
        located: the example as it was read.
        known: columns that the kind of model takes.
        kind: of model, for errors, such as `causal`.

    Raises:
        DataError: unknown columns that seem meant for the model, no `input_ids`, or a column of the wrong type.
    """
    columns, where = located.columns, located.where
    for name in columns:
        if name not in known and _seems_meant(name, known):
            raise DataError(_unknown_column(name, where, known, kind))
    if columns.get("input_ids") is None:
        raise DataError(f"data: {where}: no 'input_ids'; every example needs them")
    example = {}
    for name in known:
        if (value := columns.get(name)) is None:
            continue
        place = f"{where}: {name}"
        column = declared(name)
        if column == NEXT_SENTENCE_LABEL:
            example[name] = _next_sentence_label(value, place)
        elif column.dtype == "bool":
            example[name] = _mask(value, place)
        else:
            example[name] = _integers(value, place)
    return example


def require_equal_lengths(example: Example, where: str, leader: str, others: Sequence[str]) -> None:
    """Refuse an example in which one of `others` is given and is not as long as `leader`."""
    for name in others:
        if name in example and len(example[name]) != len(example[leader]):
            raise DataError(
                f"data: {where}: {name} has {len(example[name])} entries, {leader} has {len(example[leader])}; "
                "they must be equally long"
            )


def require_length(example: Example, where: str, limit: int, field: str, name: str = "input_ids") -> None:
    """Refuse a column longer than `limit`, which the run file's `field` sets."""
    length = len(example[name])
    if length > limit:
        what = "tokens" if name == "input_ids" else f"tokens of {name}"
        raise DataError(
            f"data: {where}: {length} {what} exceed {field}={limit}; raise {field} to {length} or cut the example"
        )


def require_ids(example: Example, where: str, vocab_size: int, names: Sequence[str]) -> None:
    """Refuse ids outside 0 .. vocab_size - 1; label columns may hold their ignored value."""
    for name in names:
        if name not in example:
            continue
        ids, ignored = example[name], declared(name).ignored
        if ignored is not None:
            ids = ids[ids != ignored]
        if len(ids) and ids.max() >= vocab_size:
            raise DataError(
                f"data: {where}: {name} holds {ids.max()}, but the model's vocab_size={vocab_size} ends at "
                f"{vocab_size - 1}; tokenize with the model's own tokenizer"
            )
        if len(ids) and ids.min() < 0:
            rule = f"only {ignored} means ignored" if ignored is not None else "ids are 0 or more"
            raise DataError(f"data: {where}: {name} holds {ids.min()}; {rule}")


def padded_mask(example: Example, name: str, ids: str, length: int) -> np.ndarray:
    """Return a mask padded to (length,). As in transformers, a missing mask is True at all positions of `ids`."""
    mask = example.get(name)
    return find_column(name).pad(np.ones(len(example[ids]), dtype=bool) if mask is None else mask, length)


def _mask(value: object, place: str) -> np.ndarray:
    mask = _integers(value, place, booleans=True)
    outside = mask[(mask != 0) & (mask != 1)]
    if len(outside):
        raise DataError(f"data: {place} must hold only 0 and 1, found {outside[0]}")
    return mask.astype(bool)


def _integers(value: object, place: str, booleans: bool = False) -> np.ndarray:
    """Return a flat, non-empty list of integers (or, if allowed, booleans) as (L,) int64."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # ragged
        array = np.empty((0, 0))
    if array.ndim == 1 and len(array) == 0:
        raise DataError(f"data: {place} is empty; remove the example")
    if array.ndim != 1 or array.dtype.kind not in ("ib" if booleans else "i"):
        kind = type(value).__name__
        if isinstance(value, list):
            kind = next((type(item).__name__ for item in value if type(item) is not int), "integers beyond 64 bits")
        raise DataError(f"data: {place} must be a flat list of integers, found {kind}")
    return array.astype(np.int64)


def _next_sentence_label(value: object, place: str) -> np.ndarray:
    if type(value) is not int or value not in (0, 1, NEXT_SENTENCE_LABEL.ignored):
        raise DataError(
            f"data: {place} must be 0 (the second part follows), 1 (it is random) or -100 (no loss), found {value!r}"
        )
    return np.array(value, dtype=np.int64)


def _seems_meant(name: str, known: Sequence[str]) -> bool:
    """Return True if a column that no model reads looks like one: to ignore a mask would train on other tokens."""
    if name in _BYPRODUCTS:
        return False
    return name in _OTHER_MODELS or _MEANT.search(name) is not None or bool(_nearest(name, known))


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=1)


def _unknown_column(name: str, where: str, known: Sequence[str], kind: str) -> str:
    names = ", ".join(known)
    if name in _OTHER_MODELS:
        other = _OTHER_MODELS[name]
        return f"data: {where}: column {name!r} belongs to {other} models, but this model is {kind}; it takes {names}"
    nearest = _nearest(name, known)
    fix = f"did you mean {nearest[0]!r}?" if nearest else "remove the column"
    return f"data: {where}: unknown column {name!r}; known are {names}; {fix}"
