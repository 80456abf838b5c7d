"""From the `data:` section of a run file to a dataset. Every rank calls this; it does not communicate."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron_ds.data.sample import Dataset
from megatron_ds.data.text import TextDataset, TextSource, TokenStream
from megatron_ds.data.token_cache import cached_tokens, default_cache_dir
from megatron_ds.data.tokenized import TokenizedDataset
from megatron_ds.data.tokenizer import load_tokenizer
from megatron_ds.errors import DataError

FORMATS = ("text", "tokenized")


def open_dataset(
    format: str,
    sources: Sequence[str],
    seq_length: int,
    vocab_size: int,
    tokenizer_path: str | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """The samples of `sources`, concatenated in the order given, checked against the model.

    Args:
        format: one of FORMATS.
        sources: files, directories, directories saved by `datasets`, or hub ids; at least one.
        seq_length: positions a sample.
        vocab_size: number of ids of the model; every id of the data must be below it.
        tokenizer_path: directory of a tokenizer; `text` needs it, `tokenized` does not look at it.
        cache_dir: where tokens of texts are kept; None is `megatron_ds/tokens` under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        DataError: a source, the tokenizer or the format is missing, malformed or does not fit the model.
    """
    if not sources:
        raise DataError("data: no sources; name at least one file, directory or hub id under data.train")
    try:
        if format == "text":
            directory = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
            return _open_text(sources, seq_length, vocab_size, tokenizer_path, directory)
        if format == "tokenized":
            return TokenizedDataset(sources, seq_length, vocab_size)
    except OSError as error:
        raise DataError(f"data: {', '.join(sources)}: cannot be read ({error})") from error
    raise DataError(f"data.format={format!r} is not read by this version; it reads {' and '.join(FORMATS)}")


def _open_text(
    sources: Sequence[str], seq_length: int, vocab_size: int, tokenizer_path: str | None, cache_dir: Path
) -> TextDataset:
    if tokenizer_path is None:
        raise DataError("model.tokenizer is not set, but data.format=text needs it; point it at a tokenizer directory")
    texts = [TextSource(source) for source in sources]  # all of them, before time is spent on the first
    tokenizer = load_tokenizer(tokenizer_path)
    cached = [cached_tokens(text, tokenizer, tokenizer_path, cache_dir) for text in texts]
    largest_id = max(part.info.largest_id for part in cached)
    if largest_id >= vocab_size:
        raise DataError(
            f"data: the tokenizer {tokenizer_path} gives ids up to {largest_id}, but the model's "
            f"vocab_size={vocab_size} ends at {vocab_size - 1}; use the model's own tokenizer, or set vocab_size to at "
            f"least {largest_id + 1} in a model that starts at random"
        )
    content = hashlib.sha256("\n".join(part.key for part in cached).encode()).hexdigest()
    return TextDataset(TokenStream([part.tokens for part in cached]), seq_length, content, ", ".join(sources))
