"""The dataset protocol: what every data format returns and every consumer of samples relies on.

A sample maps column names to arrays. The columns depend on the objective and are the same for all samples of a dataset;
`megatron_ds.columns` declares them. Shape suffixes: `S` = `seq_length`, `T` = `target_length` (S where there is no
separate encoder).

| column | shape | type | |
| --- | --- | --- | --- |
| `input_ids` | (S,) | int64 | |
| `targets` | (T,) | int64 | what position t is to predict; models do not shift them. IGNORE_INDEX carries no loss |
| `attention_mask` | (S,) | bool | True where a position may be attended to |
| `token_type_ids` | (S,) | int64 | 0 in the first part of a pair, 1 in the second |
| `next_sentence_label` | () | int64 | 0: the second part follows, 1: it is random, IGNORE_INDEX: no loss |
| `label` | () | int64 | class of the sample, IGNORE_INDEX: no loss |
| `label_scores` | (L,) | float32 | a number for each label of the model's head, NaN: no loss |
| `token_label` | (S,) | int64 | class of each token, IGNORE_INDEX: no loss |
| `decoder_input_ids` | (T,) | int64 | |
| `decoder_attention_mask` | (T,) | bool | as `attention_mask`, for the decoder's own positions |
| `position_ids` | (S,) | int64 | positions within a document, from 0; documents do not attend to one another |
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from megatron_ds.columns import find_column

Sample = Mapping[str, np.ndarray]


class Dataset(Protocol):
    """A finite, ordered, randomly addressable set of samples of one length."""

    @property
    def seq_length(self) -> int:
        """S, the number of positions of every sample."""

    @property
    def target_length(self) -> int | None:
        """T, the number of decoder positions; None where there is no separate encoder."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names of every sample; each is declared in `megatron_ds.columns`."""

    @property
    def fingerprint(self) -> str:
        """Hash of the samples' content and length: equal on every machine, changed by any change of a sample."""

    @property
    def ordered(self) -> bool:
        """True if the samples are already in the order of the run, `data.shuffle` included."""

    def __len__(self) -> int:
        """Return n, the number of samples of an epoch, at least 1."""

    def sample(self, index: int) -> Sample:
        """Return sample `index % n` as it is in epoch `index // n`, for any index >= 0.

        A pure function of the index: not of order, layout, process or earlier calls. Epochs differ where the objective
        adds noise.
        """

    def blank(self) -> Sample:
        """Return a sample without loss, in which every position may be attended to; see `blank_sample`."""

    def describe(self) -> str:
        """Return a line for logs, such as `3.1 M tokens, 5,987 samples of 512`."""


def blank_sample(
    columns: tuple[str, ...], seq_length: int, target_length: int | None, num_labels: int | None = None
) -> Sample:
    """Return a sample without loss: ids and types 0, labels ignored, masks True throughout, one document.

    Args:
        columns: names of declared columns.
        seq_length: S.
        target_length: T; None = S.
        num_labels: L, of a model with a head for labels.
    """
    return {name: find_column(name).blank_array(seq_length, target_length, num_labels) for name in columns}


def format_count(number: int) -> str:
    """Return a readable number: exact below a million, then one decimal of M or B."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"
