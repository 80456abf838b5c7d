"""Masked language modelling: which tokens of a sample are hidden, and behind what.

Of the tokens that are not special, `mask_rate` are to be predicted: 80 % of them are replaced by the mask token, 10 %
by a random one and 10 % are left as they are (Devlin et al. 2019, section 3.1). Drawing them anew for each epoch is
the dynamic masking of Liu et al. 2019, section 4.1; hiding all tokens of a word together is whole-word masking.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.dataset import IGNORE_INDEX
from megatron_ds.data.noise.seeded_random import Draws, Purpose
from megatron_ds.data.noise.word_boundaries import WordMarks, word_marks
from megatron_ds.data.objective import Masked
from megatron_ds.data.readers.tokenizer import largest_token_id, require_ids_below, special_id

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
_NEEDED = {
    "cls_token": "a masked model's sample begins with it",
    "sep_token": "a masked model's sample and each document end with it",
    "mask_token": "masking hides tokens behind it",
}


@dataclass(frozen=True)
class MaskingIds:
    """The ids that masking takes from a tokenizer.

    Attributes:
        cls: begins a sample.
        sep: ends a part of a sample, and a document.
        mask: hides a token.
        padding: the model's and the tokenizer's own; they may differ.
    """

    cls: int
    sep: int
    mask: int
    padding: tuple[int, ...]

    @property
    def special(self) -> np.ndarray:
        """All of them, which are never hidden: int64."""
        return np.array([self.cls, self.sep, self.mask, *self.padding], dtype=np.int64)


class Masker:
    """Hides tokens of samples as one objective and one tokenizer say.

    Args:
        objective: how many tokens, and whether whole words; its seed.
        ids: special tokens.
        num_random: random tokens are drawn from 0 .. num_random - 1.
        marks: where words begin; given iff `objective.whole_words`.
    """

    def __init__(self, objective: Masked, ids: MaskingIds, num_random: int, marks: WordMarks | None) -> None:
        assert 0 < objective.mask_rate < 1, f"mask_rate={objective.mask_rate}"
        assert (marks is not None) == objective.whole_words
        self.ids = ids
        self._objective = objective
        self._special = ids.special
        self._num_random = num_random
        self._marks = marks

    @property
    def identity(self) -> str:
        """Changes with everything that changes what is hidden."""
        marks = b"" if self._marks is None else self._marks.continues.tobytes() + self._marks.closes.tobytes()
        return f"{self._objective} {self.ids} {self._num_random} {hashlib.sha256(marks).hexdigest()}"

    def hide(self, ids: np.ndarray, index: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What the model reads and what it is to predict, for the sample of `index`.

        Args:
            ids: (L,) int64, special tokens among them.
            index: of the sample, in any epoch.
            allowed: (L,) bool, where tokens may be hidden; None is everywhere.

        Returns:
            (L,) int64 inputs, and (L,) int64 targets: the token itself where it was chosen, else IGNORE_INDEX.
        """
        draws = Draws(self._objective.seed, Purpose.MASKING, index)
        maskable = ~np.isin(ids, self._special)
        if allowed is not None:
            maskable &= allowed
        chosen = self._choose(ids, maskable, draws)
        inputs, targets = ids.copy(), np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        targets[chosen] = ids[chosen]
        fate, random_ids = draws.fractions(len(chosen)), draws.integers(self._num_random, len(chosen))
        inputs[chosen] = np.select(
            [fate < MASKED_SHARE, fate < MASKED_SHARE + RANDOM_SHARE], [self.ids.mask, random_ids], ids[chosen]
        )
        return inputs, targets

    def _choose(self, ids: np.ndarray, maskable: np.ndarray, draws: Draws) -> np.ndarray:
        """Positions to predict: `mask_rate` of the maskable ones, at least one where there is one."""
        positions = np.flatnonzero(maskable)
        if len(positions) == 0:
            return positions
        number = max(1, round(self._objective.mask_rate * len(positions)))
        if self._marks is None:
            return positions[draws.choice(number, len(positions))]
        return positions[_choose_words(self._marks.words_of(ids, ~maskable)[positions], number, draws)]


def load_masker(tokenizer: PreTrainedTokenizerBase, tokenizer_path: str, objective: Masked, vocab_size: int) -> Masker:
    """The masker of a tokenizer for a model of `vocab_size` ids.

    Raises:
        DataError: the tokenizer lacks a special token or, with whole words, the marks of words; or the model lacks ids.
    """
    cls, sep, mask = (special_id(tokenizer, tokenizer_path, name, use) for name, use in _NEEDED.items())
    own_padding = [] if tokenizer.pad_token_id is None else [int(tokenizer.pad_token_id)]
    ids = MaskingIds(cls, sep, mask, tuple(sorted({objective.padding_id, *own_padding})))
    require_ids_below(vocab_size, max(cls, sep, mask), tokenizer_path)
    # All ids, special ones too, as in BERT's own code and transformers' collator. A tokenizer may have more than the
    # model, as long as the data has none of them.
    num_random = min(vocab_size, largest_token_id(tokenizer) + 1)
    marks = word_marks(tokenizer, tokenizer_path, vocab_size) if objective.whole_words else None
    return Masker(objective, ids, num_random, marks)


def _choose_words(words: np.ndarray, number: int, draws: Draws) -> np.ndarray:
    """Whole words, in random order, of `number` tokens together; one that would exceed it is passed over.

    Args:
        words: (n,) number of the word that each token belongs to, ascending.
        number: of tokens wanted.
        draws: decide the order.

    Returns:
        The chosen of 0 .. n - 1, ascending. Where not even one word is that short, the first in the order, whole.
    """
    _, first, sizes = np.unique(words, return_index=True, return_counts=True)
    order = draws.order(len(sizes))
    taken, left = [], number
    for word in order.tolist():
        if sizes[word] <= left:
            taken.append(word)
            left -= int(sizes[word])
        if left == 0:
            break
    return np.sort(np.concatenate([first[word] + np.arange(sizes[word]) for word in taken or [order[0]]]))
