"""Examples for masked models: `input_ids`, `labels` aligned with them and not shifted, `attention_mask`; and, where the
model has a table or a head for them, `token_type_ids` and `next_sentence_label`.

An example without labels is masked here, differently in each epoch; with labels, its `input_ids` are used unchanged.
"""

from collections.abc import Callable

import numpy as np

from megatron_ds.columns import INPUT_IDS, TARGETS, TOKEN_TYPE_IDS
from megatron_ds.data.dataset import Sample
from megatron_ds.data.noise.masking import Masker
from megatron_ds.data.objective import Masked
from megatron_ds.data.readers.examples import Located
from megatron_ds.data.tokenized.validation import (
    MASKED_MODELS,
    Example,
    padded_mask,
    read_columns,
    require_equal_lengths,
    require_ids,
    require_length,
)
from megatron_ds.errors import DataError

_COLUMNS = ("input_ids", "labels", "attention_mask", "token_type_ids", "next_sentence_label")


class MaskedExamples:
    """Examples for masked models; see `ExampleKind`.

    Args:
        seq_length: S.
        vocab_size: ids must be below it.
        objective: decides the columns of the model and the mask rate.
        load_masker: returns the masker of examples without labels; None where there is no tokenizer. Called at most
            once, when the first such example is found.
    """

    target_length = None

    def __init__(
        self, seq_length: int, vocab_size: int, objective: Masked, load_masker: Callable[[], Masker] | None
    ) -> None:
        self.seq_length = seq_length
        self._vocab_size = vocab_size
        self._objective = objective
        self._load_masker = load_masker
        self._masker: Masker | None = None

    @property
    def identity(self) -> str:
        """The objective, and the identity of the masker where one is used."""
        return f"{self._objective} {'' if self._masker is None else self._masker.identity}"

    def parse(self, located: Located) -> Example:
        """Return the checked columns of an example; without `labels`, it is to be masked."""
        example, where = read_columns(located, _COLUMNS, MASKED_MODELS), located.where
        require_equal_lengths(example, where, "input_ids", ("labels", "attention_mask", "token_type_ids"))
        require_length(example, where, self.seq_length, "data.seq_length")
        require_ids(example, where, self._vocab_size, ("input_ids", "labels"))
        self._check_types(example, where)
        self._check_next_sentence(example, where)
        if "labels" not in example and self._masker is None:
            if self._load_masker is None:
                raise DataError(
                    f"data: {where}: no 'labels', and no tokenizer to mask the example with; set model.tokenizer, "
                    "or give every example labels (-100 = no loss)"
                )
            self._masker = self._load_masker()
        return example

    def _check_types(self, example: Example, where: str) -> None:
        types = example.get("token_type_ids")
        if types is None:
            return
        if types.min() < 0:
            raise DataError(f"data: {where}: token_type_ids holds {types.min()}; types are 0 or more")
        if not self._objective.token_types and types.any():
            raise DataError(
                f"data: {where}: column 'token_type_ids' holds {types.max()}, but this model has no token types; "
                "remove the column"
            )
        if types.max() >= self._objective.num_token_types:
            raise DataError(
                f"data: {where}: token_type_ids holds {types.max()}, but this model's type_vocab_size="
                f"{self._objective.num_token_types} ends at {self._objective.num_token_types - 1}"
            )

    def _check_next_sentence(self, example: Example, where: str) -> None:
        given = "next_sentence_label" in example
        if given and not self._objective.next_sentence:
            raise DataError(
                f"data: {where}: column 'next_sentence_label': this model has no next-sentence head; remove the column"
            )
        if self._objective.next_sentence and not given:
            raise DataError(
                f"data: {where}: no 'next_sentence_label', but this model has a next-sentence head; "
                "give 0 (the second part follows), 1 (it is random) or -100 (no loss)"
            )

    def count_targets(self, example: Example) -> int:
        """Return the number of labels with loss; without labels, that of index 0 (whole words make it vary)."""
        targets = example["labels"] if "labels" in example else self._mask(example, 0)[1]
        return int(TARGETS.carries_loss(targets).sum())

    def columns(self, given: frozenset[str], some_shorter: bool) -> tuple[str, ...]:
        """Return the columns, with a mask iff any example has one or is padded: the model would attend to padding."""
        return (
            "input_ids",
            "targets",
            *(("attention_mask",) if some_shorter or "attention_mask" in given else ()),
            *(("token_type_ids",) if self._objective.token_types else ()),
            *(("next_sentence_label",) if self._objective.next_sentence else ()),
        )

    def sample(self, example: Example, index: int) -> Sample:
        """Return the example padded: (S,) each; `next_sentence_label` is (). Missing types are 0."""
        input_ids, targets = example["input_ids"], example.get("labels")
        if targets is None:
            input_ids, targets = self._mask(example, index)
        types = example.get("token_type_ids", np.zeros_like(input_ids))
        sample = {
            "input_ids": INPUT_IDS.pad(input_ids, self.seq_length, self._objective.padding_id),
            "targets": TARGETS.pad(targets, self.seq_length),
            "attention_mask": padded_mask(example, "attention_mask", "input_ids", self.seq_length),
            "token_type_ids": TOKEN_TYPE_IDS.pad(types, self.seq_length),
        }
        if "next_sentence_label" in example:
            sample["next_sentence_label"] = example["next_sentence_label"]
        return sample

    def _mask(self, example: Example, index: int) -> tuple[np.ndarray, np.ndarray]:
        assert self._masker is not None, "parse() loads the masker for an example without labels"
        return self._masker.hide(example["input_ids"], index, example.get("attention_mask"))
