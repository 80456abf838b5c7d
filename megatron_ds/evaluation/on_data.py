"""The losses of a model on data sets: every sample once, in order, as a run validates."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_ds.columns import TARGETS
from megatron_ds.data import Causal, Dataset, Seq2Seq, collate, for_data_rank, load_tokenizer, ordered_pass
from megatron_ds.data.labels import require_labels
from megatron_ds.data.prefetch import Prefetch, pinned
from megatron_ds.engine import Engine
from megatron_ds.evaluation.report import DataResult
from megatron_ds.evaluation.setup import Prepared
from megatron_ds.evaluation.subject import DataSet, Subject
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.runtime.datasets import check_columns, open_part

Batches = list[dict[str, Tensor]]


def open_sets(subject: Subject, sets: Sequence[DataSet], prepared: Prepared) -> list[Dataset]:
    """Open the data sets of an evaluation. Called on every rank; does not communicate.

    Raises:
        ConfigError: the objective reads a label column that the data do not have.
        DataError: a source is missing or malformed, or no label carries loss.
    """
    assert prepared.objective is not None
    run, columns, found = subject.run, prepared.label_columns, []
    for one in sets:
        data = open_part(prepared.model, one.section, prepared.objective.data, None, validation=one.validation)
        check_columns(data, columns, run.train.objective, one.section.format, prepared.model.hf)
        require_labels(data, columns, "data.valid", one.name, "give some labels another value than the ignored one")
        found.append(data)
    return found


def evaluate_set(engine: Engine, prepared: Prepared, one: DataSet, data: Dataset) -> DataResult:
    """Compute the losses and metrics of a data set. Collective over the world."""
    assert prepared.objective is not None
    config, kind = prepared.plan.config, prepared.objective.data
    own = isinstance(kind, Causal | Seq2Seq) and engine.head.terms[0] == TARGETS.name
    counts_bytes = own and isinstance(kind, Causal) and one.section.format == "text"
    reader = _Reader(engine, data, config.micro_batch_size, _byte_counter(prepared) if counts_bytes else None)
    parts = []
    with Prefetch(reader.read, ordered_pass(len(data), config.global_batch_size), one.section.prefetch) as batches:
        for batch in batches:
            parts.append(engine.evaluate(batch))
    num_bytes = int(all_reduce_(torch.tensor(reader.num_bytes), engine.grid.host)) if counts_bytes else 0
    losses = reduce(operator.add, parts)
    return DataResult.of(one.name, len(data), losses, predicts_text=own, num_bytes=num_bytes)


class _Reader:
    """The micro-batches of one data rank, out of global batches.

    Attributes:
        num_bytes: length of the text of the labels that were read, in UTF-8, on the first rank of each data rank.
    """

    def __init__(
        self, engine: Engine, data: Dataset, micro_batch_size: int, count: Callable[[dict[str, Tensor]], int] | None
    ) -> None:
        self._engine, self._data, self._micro = engine, data, micro_batch_size
        self._count = count if engine.grid.is_first_of_batch else None
        self.num_bytes = 0

    def read(self, indices: np.ndarray) -> Batches:
        """Return this rank's micro-batches of a global batch."""
        axis = self._engine.grid.batch
        batches = [collate(self._data, part) for part in for_data_rank(indices, axis.rank, axis.size, self._micro)]
        if self._count is not None:
            self.num_bytes += sum(map(self._count, batches))
        return pinned(batches, self._engine.device)


def _byte_counter(prepared: Prepared) -> Callable[[dict[str, Tensor]], int]:
    path = prepared.model.section.tokenizer_path
    assert path is not None, "text needs a tokenizer"
    return partial(count_bytes, load_tokenizer(path))


def count_bytes(tokenizer: PreTrainedTokenizerBase, batch: dict[str, Tensor]) -> int:
    """Count the UTF-8 bytes of the text that labels add to their rows; special tokens have none.

    It is the text of a row with its last label, without that of its first token: labels alone would be decoded as the
    beginning of a text, where some tokenizers drop a space. A character that the border of two rows divides counts for
    up to two bytes more or less.

    Args:
        tokenizer: that of the model.
        batch: `input_ids` and `targets`, (B, S), of rows that are labelled throughout, or not at all.
    """
    total = 0
    for ids, targets in zip(batch["input_ids"], batch["targets"]):
        if (targets < 0).any():  # a blank sample
            continue
        row = torch.cat([ids, targets[-1:]]).tolist()
        whole, first = (
            str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for part in (row, row[:1])
        )
        total += len(whole.encode()) - len(first.encode())
    return total
