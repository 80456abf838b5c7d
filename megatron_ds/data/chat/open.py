"""From the sources of conversations to a dataset."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ds.data.chat.dataset import ChatDataset
from megatron_ds.data.chat.rendering import ChatTemplate
from megatron_ds.data.chat.tokens import cached_conversations, offset_backend
from megatron_ds.data.objective import Causal, Objective
from megatron_ds.data.options import ChatOptions
from megatron_ds.data.readers.tokenizer import load_tokenizer, require_ids_below
from megatron_ds.data.text.token_cache import default_cache_dir
from megatron_ds.errors import DataError


def open_chat(
    sources: Sequence[str],
    objective: Objective,
    seq_length: int,
    vocab_size: int,
    tokenizer_path: str | None,
    cache_dir: str | None,
    options: ChatOptions,
) -> ChatDataset:
    """The conversations of `sources`, one source after the other; arguments as `open_dataset`.

    Raises:
        DataError: a source, the tokenizer or its template does not fit.
    """
    if not isinstance(objective, Causal):
        raise DataError("data.format=chat is for models that write on; for this one use data.format=text or tokenized")
    if tokenizer_path is None:
        raise DataError("model.tokenizer is not set, but data.format=chat needs it; point it at a tokenizer directory")
    tokenizer = load_tokenizer(tokenizer_path)
    template = ChatTemplate(tokenizer, tokenizer_path, last_only=options.loss_turns == "last")
    backend = offset_backend(tokenizer, tokenizer_path)
    directory = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    parts = [cached_conversations(source, tokenizer, backend, template, directory) for source in sources]
    require_ids_below(vocab_size, max(int(part.ids.max()) for part in parts), tokenizer_path)
    return ChatDataset(parts, seq_length, options)
