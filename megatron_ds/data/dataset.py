"""What every dataset gives and every consumer takes: one training sample, and the protocol of a dataset of them.

A sample is arrays by name; the names depend on the objective, and are the same for all samples of a dataset.
Shape suffixes: `S` = `seq_length`, `T` = `target_length` (S where there is no decoder beside an encoder).

| column | shape | type | |
| --- | --- | --- | --- |
| `input_ids` | (S,) | int64 | |
| `targets` | (T,) | int64 | what position t is to predict; a model never shifts them. IGNORE_INDEX carries no loss |
| `attention_mask` | (S,) | bool | True where a position may be attended to |
| `token_type_ids` | (S,) | int64 | 0 in the first part of a pair, 1 in the second |
| `next_sentence_label` | () | int64 | 0: the second part follows, 1: it is random, IGNORE_INDEX: no loss |
| `decoder_input_ids` | (T,) | int64 | |
| `decoder_attention_mask` | (T,) | bool | as `attention_mask`, for the decoder's own positions |
| `position_ids` | (S,) | int64 | places within a document, 0 where one begins; none is seen by another |
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

IGNORE_INDEX = -100
"""A target with this value carries no loss (transformers' and torch's convention)."""

Sample = Mapping[str, np.ndarray]


class Dataset(Protocol):
    """A finite, ordered, randomly addressable set of samples of one length."""

    @property
    def seq_length(self) -> int:
        """S, the number of positions of every sample."""

    @property
    def target_length(self) -> int | None:
        """T, the number of positions of the decoder; None where there is no decoder beside an encoder."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that every sample has."""

    @property
    def fingerprint(self) -> str:
        """Hash of the samples' content and length: equal on every machine, and changed by any change of a sample."""

    @property
    def ordered(self) -> bool:
        """Whether the samples stand in the order in which a run takes them, which `data.shuffle` had its say in."""

    def __len__(self) -> int:
        """n, the number of samples of an epoch, at least 1."""

    def sample(self, index: int) -> Sample:
        """Sample `index % n` as it is in epoch `index // n`, for any index >= 0.

        A pure function of the index: not of order, layout, process or earlier calls. Epochs differ where the objective
        draws noise.
        """

    def blank(self) -> Sample:
        """A sample without any loss; every position may be attended to."""

    def describe(self) -> str:
        """One line for people, such as `3.1 M tokens, 5,987 samples of 512`."""


def blank_sample(columns: tuple[str, ...], seq_length: int, target_length: int | None) -> Sample:
    """What `Dataset.blank` gives: ids and types 0, targets IGNORE_INDEX, masks True throughout, one document."""
    decoder_length = seq_length if target_length is None else target_length
    sample = {}
    for name in columns:
        if name == "next_sentence_label":
            shape: tuple[int, ...] = ()
        else:
            shape = (decoder_length if name.startswith("decoder_") or name == "targets" else seq_length,)
        if name.endswith("attention_mask"):
            sample[name] = np.ones(shape, dtype=bool)
        elif name == "position_ids":
            sample[name] = np.arange(seq_length, dtype=np.int64)
        else:
            no_loss = name in ("targets", "next_sentence_label")
            sample[name] = np.full(shape, IGNORE_INDEX if no_loss else 0, dtype=np.int64)
    return sample
