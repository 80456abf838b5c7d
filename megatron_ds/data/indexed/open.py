"""From the prefixes of indexed files to a dataset."""

from collections.abc import Sequence

from megatron_ds.data.objective import Objective
from megatron_ds.data.options import Order, Split
from megatron_ds.data.sample import Dataset


def open_indexed(
    sources: Sequence[str],
    objective: Objective,
    seq_length: int,
    vocab_size: int,
    tokenizer_path: str | None,
    cache_dir: str | None,
    order: Order | None,
    split: Split | None,
) -> Dataset:
    """The documents behind `sources`."""
    raise NotImplementedError
