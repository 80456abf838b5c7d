"""The columns of a batch, each declared once: length, dtype, padding, and the label that carries no loss.

A batch maps column names to arrays. The code that makes, checks, pads, renders or reads a column takes these facts from
its declaration. An objective or a data format of another package declares the columns that it adds.

Shape suffixes: `S` = positions of a sample, `T` = positions of the decoder (S where there is no separate encoder),
`L` = labels of the model's head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ds.errors import ConfigError
from megatron_ds.registry import Registry

IGNORE_INDEX = -100
"""The label that carries no loss (the convention of torch and transformers)."""

Length = Literal["sequence", "target", "sample", "labels"]


@dataclass(frozen=True)
class Column:
    """A column of a batch: one array for each sample, all of one shape and dtype.

    Attributes:
        name: the key in samples and batches.
        length: `sequence` is (S,), `target` is (T,), `sample` is (): one value for the sample, `labels` is (L,).
        dtype: numpy's name.
        fill: value of padding positions; None counts them 0, 1, 2, ... as a document of their own. Where the model has
            a padding id, ids are padded with that instead.
        ignored: the label that carries no loss, which may be NaN; None for columns that are not labels.
        blank: value in a sample without loss; None = `ignored`, or `fill` for columns that are not labels.
    """

    name: str
    length: Length = "sequence"
    dtype: str = "int64"
    fill: int | float | bool | None = 0
    ignored: int | float | None = None
    blank: int | float | bool | None = None

    @property
    def has_positions(self) -> bool:
        """True if it has an entry for each position."""
        return self.length in ("sequence", "target")

    def shape(self, seq_length: int, target_length: int | None, num_labels: int | None = None) -> tuple[int, ...]:
        """Return the shape of one sample's array; `target_length` None = S, `num_labels` None = the model has none."""
        if self.length == "sample":
            return ()
        if self.length == "labels":
            assert num_labels is not None, f"{self.name} is for models with a head for labels"
            return (num_labels,)
        return (seq_length if self.length == "sequence" or target_length is None else target_length,)

    def blank_array(self, seq_length: int, target_length: int | None, num_labels: int | None = None) -> np.ndarray:
        """Return the array of a sample without loss, of `shape`."""
        shape = self.shape(seq_length, target_length, num_labels)
        value = next((value for value in (self.blank, self.ignored, self.fill) if value is not None), None)
        return np.arange(*shape, dtype=self.dtype) if value is None else np.full(shape, value, dtype=self.dtype)

    def pad(self, values: np.ndarray, length: int, fill: int | None = None) -> np.ndarray:
        """Pad on the right: (L,) -> (length,). A `fill` that is given replaces the column's own."""
        missing = length - len(values)
        value = self.fill if fill is None else fill
        if value is None:
            return np.concatenate([values, np.arange(missing, dtype=values.dtype)])
        return np.pad(values, (0, missing), constant_values=value)

    def carries_loss(self, values: np.ndarray) -> np.ndarray:
        """Return the mask of the labels that carry loss, bool, of the shape of `values`."""
        assert self.ignored is not None, f"{self.name} is not a label column"
        return ~np.isnan(values) if math.isnan(self.ignored) else values != self.ignored


COLUMNS: Registry[Column] = Registry("column")


def declare(column: Column) -> Column:
    """Declare a column and return it. A second declaration that equals the first changes nothing.

    Raises:
        ConfigError: another column has the name.
    """
    if column.name not in COLUMNS:
        return COLUMNS.register(column.name, column)
    known = COLUMNS.get(column.name)
    if known != column:
        raise ConfigError(f"column {column.name} is already declared as {known}, not as {column}; rename one")
    return known


def find_column(name: str) -> Column:
    """Return the declaration of a column.

    Raises:
        ConfigError: no column of that name is declared; names the nearest one.
    """
    return COLUMNS.get(name)


INPUT_IDS = declare(Column("input_ids"))
# The token that position t predicts: the data shift labels, never a model.
TARGETS = declare(Column("targets", "target", fill=IGNORE_INDEX, ignored=IGNORE_INDEX))
# True where a position may be attended to.
ATTENTION_MASK = declare(Column("attention_mask", dtype="bool", fill=False, blank=True))
# 0 in the first part of a pair, 1 in the second.
TOKEN_TYPE_IDS = declare(Column("token_type_ids"))
# 0: the second part of the pair follows the first; 1: it is a random one.
NEXT_SENTENCE_LABEL = declare(Column("next_sentence_label", "sample", fill=IGNORE_INDEX, ignored=IGNORE_INDEX))
# The class of the sample.
LABEL = declare(Column("label", "sample", fill=IGNORE_INDEX, ignored=IGNORE_INDEX))
# A number for each label: 1 and 0 where labels do not exclude one another, any number in a regression.
LABEL_SCORES = declare(Column("label_scores", "labels", dtype="float32", fill=math.nan, ignored=math.nan))
# The class of each token.
TOKEN_LABEL = declare(Column("token_label", fill=IGNORE_INDEX, ignored=IGNORE_INDEX))
DECODER_INPUT_IDS = declare(Column("decoder_input_ids", "target"))
# Like `attention_mask`, for the positions of the decoder.
DECODER_ATTENTION_MASK = declare(Column("decoder_attention_mask", "target", dtype="bool", fill=False, blank=True))
# Positions within a document: 0 where one begins. Documents do not attend to one another.
POSITION_IDS = declare(Column("position_ids", fill=None))

# Derived from `position_ids` by the engine for each step, so that no data format has it: (B, D + 1) int32, the
# positions in each row where its documents begin, then the length of the row.
DOCUMENT_BOUNDS = "document_bounds"
