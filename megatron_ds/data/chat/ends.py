"""Control tokens with which the learned turns of conversations end: the trained model stops by writing them."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.chat.tokens import Conversations


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the special tokens of a tokenizer: id -> text."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))}


def learned_ends(parts: Iterable[Conversations], control: Mapping[int, str]) -> dict[int, str]:
    """Return the control tokens at the ends of spans with loss: id -> text.

    A span ends with its control token, or with white space after it that templates write in one token.
    """
    found: set[int] = set()
    for part in parts:
        found |= _last_control(part.ids, part.learned, part.starts, list(control))
    return {number: control[number] for number in sorted(found)}


def _last_control(ids: np.ndarray, learned: np.ndarray, starts: np.ndarray, control: Sequence[int]) -> set[int]:
    following = np.append(learned[1:], False)
    following[starts[1:-1] - 1] = False  # a conversation ends before the next
    last = np.flatnonzero(learned & ~following)
    is_control = np.isin(ids[last], control)
    before = last[~is_control] - 1
    before = before[before >= 0]
    before = before[learned[before]]
    candidates = np.unique(np.concatenate([ids[last[is_control]], ids[before]]))
    return set(candidates[np.isin(candidates, control)].tolist())
