"""Masked language modelling: the choice of tokens to predict, and their replacements.

A fraction `mask_rate` of the tokens that are not special is to be predicted: 80 % of them are replaced by the mask
token, 10 % by a random one and 10 % are kept (Devlin et al. 2019, section 3.1). The choice differs in every epoch
(dynamic masking, Liu et al. 2019, section 4.1); whole-word masking hides all tokens of a word at once.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.data.noise.seeded_random import Purpose, SeededRandom
from megatron_ds.data.noise.word_boundaries import WordBoundaries, word_boundaries
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
    """The special ids of a tokenizer that masking needs.

    Attributes:
        cls: begins a sample.
        sep: ends a part of a sample, and a document.
        mask: replaces a hidden token.
        padding: of the model and of the tokenizer; they may differ.
    """

    cls: int
    sep: int
    mask: int
    padding: tuple[int, ...]

    @property
    def special(self) -> np.ndarray:
        """All of these ids, which are never hidden: int64."""
        return np.array([self.cls, self.sep, self.mask, *self.padding], dtype=np.int64)


class Masker:
    """Masking of samples, for one objective and one tokenizer.

    Args:
        objective: mask rate, whole words or not, and seed.
        ids: special tokens.
        num_random: random tokens are drawn from 0 .. num_random - 1.
        boundaries: of words; given iff `objective.whole_words`.
    """

    def __init__(self, objective: Masked, ids: MaskingIds, num_random: int, boundaries: WordBoundaries | None) -> None:
        assert 0 < objective.mask_rate < 1, f"mask_rate={objective.mask_rate}"
        assert (boundaries is not None) == objective.whole_words
        self.ids = ids
        self._objective = objective
        self._special = ids.special
        self._num_random = num_random
        self._boundaries = boundaries

    @property
    def identity(self) -> str:
        """A text that changes with everything that affects masking; part of fingerprints."""
        words = self._boundaries
        content = b"" if words is None else words.continues.tobytes() + words.closes.tobytes()
        return f"{self._objective} {self.ids} {self._num_random} {hashlib.sha256(content).hexdigest()}"

    def hide(self, ids: np.ndarray, index: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Choose tokens to predict, and hide them.

        Args:
            ids: (L,) int64, special tokens included.
            index: of the sample, in any epoch.
            allowed: (L,) bool, positions whose tokens may be hidden; None = all.

        Returns:
            (L,) int64 inputs, and (L,) int64 targets: the token itself at chosen positions, else IGNORE_INDEX.
        """
        random = SeededRandom(self._objective.seed, Purpose.MASKING, index)
        maskable = ~np.isin(ids, self._special)
        if allowed is not None:
            maskable &= allowed
        chosen = self._choose(ids, maskable, random)
        inputs, targets = ids.copy(), np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        targets[chosen] = ids[chosen]
        fate, random_ids = random.fractions(len(chosen)), random.integers(self._num_random, len(chosen))
        inputs[chosen] = np.select(
            [fate < MASKED_SHARE, fate < MASKED_SHARE + RANDOM_SHARE], [self.ids.mask, random_ids], ids[chosen]
        )
        return inputs, targets

    def _choose(self, ids: np.ndarray, maskable: np.ndarray, random: SeededRandom) -> np.ndarray:
        """Return the positions to predict: `mask_rate` of the maskable ones, at least one if there is any."""
        positions = np.flatnonzero(maskable)
        if len(positions) == 0:
            return positions
        number = max(1, round(self._objective.mask_rate * len(positions)))
        if self._boundaries is None:
            return positions[random.choice(number, len(positions))]
        words = self._boundaries.word_numbers(ids, ~maskable)[positions]
        return positions[_choose_words(words, number, random)]


def load_masker(tokenizer: PreTrainedTokenizerBase, tokenizer_path: str, objective: Masked, vocab_size: int) -> Masker:
    """Return the masker of a tokenizer for a model of `vocab_size` ids.

    Raises:
        DataError: the tokenizer lacks a special token or, with whole words, word markers; or the model lacks ids.
    """
    cls, sep, mask = (special_id(tokenizer, tokenizer_path, name, use) for name, use in _NEEDED.items())
    own_padding = [] if tokenizer.pad_token_id is None else [int(tokenizer.pad_token_id)]
    ids = MaskingIds(cls, sep, mask, tuple(sorted({objective.padding_id, *own_padding})))
    require_ids_below(vocab_size, max(cls, sep, mask), tokenizer_path)
    # All ids, special ones too, as in BERT's own code and transformers' collator. A tokenizer may have ids that the
    # model lacks, as long as the data does not use them.
    num_random = min(vocab_size, largest_token_id(tokenizer) + 1)
    boundaries = word_boundaries(tokenizer, tokenizer_path, vocab_size) if objective.whole_words else None
    return Masker(objective, ids, num_random, boundaries)


def _choose_words(words: np.ndarray, number: int, random: SeededRandom) -> np.ndarray:
    """Choose whole words, in random order, of `number` tokens in total; words that would exceed it are skipped.

    Args:
        words: (n,) number of the word of each token, ascending.
        number: of tokens to choose.
        random: decides the order.

    Returns:
        The chosen of 0 .. n - 1, ascending. If every word is longer than `number`, all tokens of the first in order.
    """
    _, first, sizes = np.unique(words, return_index=True, return_counts=True)
    order = random.order(len(sizes))
    taken, left = [], number
    for word in order.tolist():
        if sizes[word] <= left:
            taken.append(word)
            left -= int(sizes[word])
        if left == 0:
            break
    return np.sort(np.concatenate([first[word] + np.arange(sizes[word]) for word in taken or [order[0]]]))
