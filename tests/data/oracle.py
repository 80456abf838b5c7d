"""Megatron-core's own datasets, as what ours must equal. Imported late: that takes seconds."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class _Tokenizer:
    """What GPTDataset asks of one."""

    eod = pad = 0
    vocab_size = 1000
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


def _quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.datasets.blended_megatron_dataset_builder as builder
        import megatron.core.datasets.gpt_dataset as gpt
        import megatron.core.datasets.indexed_dataset as indexed
    logging.getLogger("megatron").setLevel(logging.ERROR)
    return builder, gpt, indexed


def write(prefix: Path, documents: Sequence[Sequence[np.ndarray]], dtype: type) -> None:
    """Files by megatron-core's builder; a document is sequences."""
    import torch

    _, _, indexed = _quietly()
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.from_numpy(sequence.astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def read(prefix: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, Any]:
    """Sequences, lengths, document indices, type."""
    _, _, indexed = _quietly()
    found = indexed.IndexedDataset(str(prefix))
    sequences = [np.array(found.get(index)) for index in range(len(found))]
    return sequences, np.array(found.sequence_lengths), np.array(found.document_indices), found.index.dtype


def datasets(
    prefixes: Sequence[Path],
    weights: Sequence[float] | None,
    split: str,
    sizes: Sequence[int | None],
    seq_length: int,
    seed: int,
) -> list[Any]:
    """Training, validation and test sets of megatron-core."""
    builder, gpt, _ = _quietly()
    config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(prefix) for prefix in prefixes], list(weights) if weights is not None else None),
        split=split,
        path_to_cache="",
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
    )
    return builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, list(sizes), lambda: True, config).build()
