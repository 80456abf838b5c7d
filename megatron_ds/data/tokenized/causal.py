"""Examples of a causal model: `input_ids`, `labels` aligned with them (absent = `input_ids`), `attention_mask`.

`position_ids` say that an example is several documents one after the other: they begin at 0 wherever a document does.

A causal model of transformers shifts the labels inside; here they are shifted when a sample is read: targets[t] =
labels[t + 1], and the last position has none.
"""

import numpy as np

from megatron_ds.data.dataset import IGNORE_INDEX, Sample
from megatron_ds.data.readers.examples import Located
from megatron_ds.data.tokenized.validation import (
    Example,
    padded,
    padded_mask,
    read_columns,
    require_equal_lengths,
    require_ids,
    require_length,
)
from megatron_ds.errors import DataError

PAD_ID = 0  # any valid id will do: padded positions have no target, and a causal model never looks ahead at them
_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


class CausalExamples:
    """See `ExampleKind`.

    Args:
        seq_length: S.
        vocab_size: ids must be below it.
    """

    target_length = None
    identity = "causal"

    def __init__(self, seq_length: int, vocab_size: int) -> None:
        self.seq_length = seq_length
        self._vocab_size = vocab_size

    def parse(self, located: Located) -> Example:
        """The columns; `labels` are there in any case."""
        example, where = read_columns(located, _COLUMNS, "causal"), located.where
        example.setdefault("labels", example["input_ids"])
        require_equal_lengths(example, where, "input_ids", ("labels", "attention_mask", "position_ids"))
        _require_restarts(example, where)
        require_length(example, where, self.seq_length, "data.seq_length")
        require_ids(example, where, self._vocab_size, ("input_ids", "labels"))
        return example

    def count_targets(self, example: Example) -> int:
        """Labels that are not ignored, the first of each document left out: nothing predicts it."""
        return int((_shifted(example) != IGNORE_INDEX).sum())

    def columns(self, given: frozenset[str], some_shorter: bool) -> tuple[str, ...]:
        """With a mask iff any example has one: what a causal model attends to lies before the padding."""
        return ("input_ids", "targets", *(name for name in ("attention_mask", "position_ids") if name in given))

    def sample(self, example: Example, index: int) -> Sample:
        """The example shifted and padded: (S,) each. The padding is a document of its own."""
        length = len(example["input_ids"])
        positions = example.get("position_ids", np.arange(length))
        return {
            "input_ids": padded(example["input_ids"], self.seq_length, PAD_ID),
            "targets": padded(_shifted(example), self.seq_length, IGNORE_INDEX),
            "position_ids": np.concatenate([positions, np.arange(self.seq_length - length)]),
            "attention_mask": padded_mask(example, "attention_mask", "input_ids", self.seq_length),
        }


def _shifted(example: Example) -> np.ndarray:
    """(L,): the label of what follows in the same document."""
    shifted = np.append(example["labels"][1:], IGNORE_INDEX)
    if "position_ids" in example:
        shifted[:-1][example["position_ids"][1:] == 0] = IGNORE_INDEX
    return shifted


def _require_restarts(example: Example, where: str) -> None:
    positions = example.get("position_ids")
    if positions is None:
        return
    before = np.concatenate([[-1], positions[:-1]])
    wrong = np.flatnonzero((positions != 0) & (positions != before + 1))
    if len(wrong):
        raise DataError(
            f"data: {where}: position_ids holds {positions[wrong[0]]} after {before[wrong[0]]}; each is one more than "
            "the one before, or 0 where a document begins"
        )
