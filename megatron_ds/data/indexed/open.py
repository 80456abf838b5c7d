"""From the prefix of indexed files to a dataset."""

import json
from pathlib import Path

from megatron_ds.data.indexed.dataset import IndexedDataset
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.objective import Causal, Objective
from megatron_ds.data.options import Order, Split
from megatron_ds.data.text.token_cache import default_cache_dir
from megatron_ds.errors import DataError


def open_indexed(
    source: str,
    objective: Objective,
    seq_length: int,
    vocab_size: int,
    cache_dir: str | None,
    order: Order | None,
    split: Split | None,
) -> IndexedDataset:
    """The documents behind one prefix; arguments as `open_dataset`.

    Raises:
        DataError: the files are missing, damaged or do not fit the model.
    """
    if not isinstance(objective, Causal):
        raise DataError("data.format=indexed is for models that write on; for this one use data.format=text")
    file = IndexedFile(source)
    _check_largest_id(file, vocab_size)
    directory = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    return IndexedDataset(file, seq_length, vocab_size, order, split, directory)


def _check_largest_id(file: IndexedFile, vocab_size: int) -> None:
    """What the manifest of `prepare` says, where there is one, so that a wrong tokenizer is found at once."""
    manifest = Path(f"{file.prefix}.json")
    try:
        largest = json.loads(manifest.read_text(encoding="utf-8")).get("largest_id")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(largest, int) and largest >= vocab_size:
        raise DataError(
            f"data: {file.prefix}: holds ids up to {largest}, but the model's vocab_size={vocab_size} ends at "
            f"{vocab_size - 1}; prepare the data with the model's own tokenizer"
        )
