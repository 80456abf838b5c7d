"""From the sources of conversations to a dataset."""

from collections.abc import Sequence

from megatron_ds.data.objective import Objective
from megatron_ds.data.options import ChatOptions
from megatron_ds.data.sample import Dataset


def open_chat(
    sources: Sequence[str],
    objective: Objective,
    seq_length: int,
    vocab_size: int,
    tokenizer_path: str | None,
    cache_dir: str | None,
    options: ChatOptions,
) -> Dataset:
    """The conversations of `sources`."""
    raise NotImplementedError
