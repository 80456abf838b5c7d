"""The checks that examples of token ids go through, whatever kind of model they are for."""

import difflib
from collections.abc import Sequence

import numpy as np

from megatron_ds.data.dataset import IGNORE_INDEX
from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError

MASKED_MODELS, SEQ2SEQ_MODELS = "BERT-like", "encoder-decoder"
_OTHER_MODELS = {
    "token_type_ids": MASKED_MODELS,
    "next_sentence_label": MASKED_MODELS,
    "decoder_input_ids": SEQ2SEQ_MODELS,
    "decoder_attention_mask": SEQ2SEQ_MODELS,
}

Example = dict[str, np.ndarray]
"""The columns that an example has, checked: (L,) int64 ids, (L,) bool masks, () int64 labels; L differs."""


def read_columns(located: Located, known: Sequence[str], kind: str) -> Example:
    """The columns of an example that are not null, in the order of `known`.

    Args:
        located: the example as it was read.
        known: the columns that the kind of model takes.
        kind: of model, for errors: `causal`.

    Raises:
        DataError: unknown columns, no `input_ids`, or a column of the wrong type.
    """
    columns, where = located
    for name in columns:
        if name not in known:
            raise DataError(_unknown_column(name, where, known, kind))
    if columns.get("input_ids") is None:
        raise DataError(f"data: {where}: no 'input_ids'; every example needs them")
    example = {}
    for name in known:
        if (value := columns.get(name)) is None:
            continue
        place = f"{where}: {name}"
        if name == "next_sentence_label":
            example[name] = _integer(value, place)
        elif name.endswith("attention_mask"):
            example[name] = _mask(value, place)
        else:
            example[name] = _integers(value, place)
    return example


def require_equal_lengths(example: Example, where: str, leader: str, others: Sequence[str]) -> None:
    """Refuses an example in which one of `others`, where it is there, is not as long as `leader`."""
    for name in others:
        if name in example and len(example[name]) != len(example[leader]):
            raise DataError(
                f"data: {where}: {name} has {len(example[name])} entries, {leader} has {len(example[leader])}; "
                "they must be equally long"
            )


def require_length(example: Example, where: str, limit: int, field: str, name: str = "input_ids") -> None:
    """Refuses a column longer than `limit`, which the run file's `field` sets."""
    length = len(example[name])
    if length > limit:
        what = "tokens" if name == "input_ids" else f"tokens of {name}"
        raise DataError(
            f"data: {where}: {length} {what} exceed {field}={limit}; raise {field} to {length} or cut the example"
        )


def require_ids(example: Example, where: str, vocab_size: int, names: Sequence[str]) -> None:
    """Refuses ids outside 0 .. vocab_size - 1; among labels, IGNORE_INDEX is allowed."""
    for name in names:
        if name not in example:
            continue
        ids = example[name]
        if name == "labels":
            ids = ids[ids != IGNORE_INDEX]
        if len(ids) and ids.max() >= vocab_size:
            raise DataError(
                f"data: {where}: {name} holds {ids.max()}, but the model's vocab_size={vocab_size} ends at "
                f"{vocab_size - 1}; tokenise with the model's own tokenizer"
            )
        if len(ids) and ids.min() < 0:
            rule = "only -100 means ignored" if name == "labels" else "ids are 0 or more"
            raise DataError(f"data: {where}: {name} holds {ids.min()}; {rule}")


def padded(values: np.ndarray, length: int, filler: int | bool) -> np.ndarray:
    """`values` filled up on the right: (L,) -> (length,), of the same type."""
    return np.pad(values, (0, length - len(values)), constant_values=filler)


def padded_mask(example: Example, name: str, of: str, length: int) -> np.ndarray:
    """A mask filled up with False; an example without one counts as True throughout, as transformers would take it."""
    mask = example.get(name)
    return padded(np.ones(len(example[of]), dtype=bool) if mask is None else mask, length, False)


def _mask(value: object, place: str) -> np.ndarray:
    mask = _integers(value, place, booleans=True)
    outside = mask[(mask != 0) & (mask != 1)]
    if len(outside):
        raise DataError(f"data: {place} must hold only 0 and 1, found {outside[0]}")
    return mask.astype(bool)


def _integers(value: object, place: str, booleans: bool = False) -> np.ndarray:
    """A flat, non-empty list of integers (or, if allowed, booleans) as (L,) int64."""
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


def _integer(value: object, place: str) -> np.ndarray:
    if type(value) is not int or value not in (0, 1, IGNORE_INDEX):
        raise DataError(
            f"data: {place} must be 0 (the second part follows), 1 (it is random) or -100 (no loss), found {value!r}"
        )
    return np.array(value, dtype=np.int64)


def _unknown_column(name: str, where: str, known: Sequence[str], kind: str) -> str:
    names = ", ".join(known)
    if name in _OTHER_MODELS:
        other = _OTHER_MODELS[name]
        return f"data: {where}: column {name!r} belongs to {other} models, but this model is {kind}; it takes {names}"
    nearest = difflib.get_close_matches(name, known, n=1)
    fix = f"did you mean {nearest[0]!r}?" if nearest else "remove the column"
    return f"data: {where}: unknown column {name!r}; known are {names}; {fix}"
