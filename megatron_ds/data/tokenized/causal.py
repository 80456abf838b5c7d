"""Examples for causal models: `input_ids`, `labels` aligned with them (default: `input_ids`), `attention_mask`.

`position_ids` divide an example into several documents: they begin at 0 wherever a document does.

Causal models of transformers shift the labels themselves; here they are shifted when a sample is read: targets[t] =
labels[t + 1], and the last position has none.
"""

import numpy as np

from megatron_ds.columns import IGNORE_INDEX, INPUT_IDS, POSITION_IDS, TARGETS
from megatron_ds.data.dataset import Sample
from megatron_ds.data.readers.examples import Located
from megatron_ds.data.readers.placeholders import NO_PLACEHOLDERS, Placeholders
from megatron_ds.data.tokenized.validation import (
    Example,
    padded_mask,
    read_columns,
    require_equal_lengths,
    require_ids,
    require_length,
)
from megatron_ds.errors import DataError

_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


class CausalExamples:
    """Examples for causal models; see `ExampleKind`.

    Padding ids need no choice: padded positions have no target, and no position before them attends to them.

    Args:
        seq_length: S.
        vocab_size: ids must be below it.
        placeholders: ids that no example may hold.
    """

    target_length = None
    identity = "causal"

    def __init__(self, seq_length: int, vocab_size: int, placeholders: Placeholders = NO_PLACEHOLDERS) -> None:
        self.seq_length = seq_length
        self._vocab_size, self._placeholders = vocab_size, placeholders

    def parse(self, located: Located) -> Example:
        """Return the checked columns of an example; `labels` are always present."""
        example, where = read_columns(located, _COLUMNS, "causal"), located.where
        example.setdefault("labels", example["input_ids"])
        require_equal_lengths(example, where, "input_ids", ("labels", "attention_mask", "position_ids"))
        _require_restarts(example, where)
        require_length(example, where, self.seq_length, "data.seq_length")
        require_ids(example, where, self._vocab_size, ("input_ids", "labels"))
        for name in ("input_ids", "labels"):
            self._placeholders.require_none(example[name], f"{where}: {name}")
        return example

    def count_targets(self, example: Example) -> int:
        """Return the number of labels with loss, without the first of each document: nothing predicts it."""
        return int(TARGETS.carries_loss(_shifted(example)).sum())

    def columns(self, given: frozenset[str], some_shorter: bool) -> tuple[str, ...]:
        """Return the columns, with a mask iff any example has one: causal models never attend to padding."""
        return ("input_ids", "targets", *(name for name in ("attention_mask", "position_ids") if name in given))

    def sample(self, example: Example, index: int) -> Sample:
        """Return the example shifted and padded: (S,) each. The padding is a document of its own."""
        length = self.seq_length
        positions = example.get("position_ids", np.arange(len(example["input_ids"])))
        return {
            "input_ids": INPUT_IDS.pad(example["input_ids"], length),
            "targets": TARGETS.pad(_shifted(example), length),
            "position_ids": POSITION_IDS.pad(positions, length),
            "attention_mask": padded_mask(example, "attention_mask", "input_ids", length),
        }


def _shifted(example: Example) -> np.ndarray:
    """Return (L,): at each position, the label of the next one of the same document."""
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
