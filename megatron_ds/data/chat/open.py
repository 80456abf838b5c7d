"""Opening `data.format: chat`."""

from megatron_ds.data.chat.dataset import ChatDataset
from megatron_ds.data.chat.ends import control_tokens
from megatron_ds.data.chat.options import ChatOptions
from megatron_ds.data.chat.plain import PlainTemplate
from megatron_ds.data.chat.rendering import ChatTemplate
from megatron_ds.data.chat.tokens import Renderer, cached_conversations, offset_backend
from megatron_ds.data.objective import Causal
from megatron_ds.data.readers.tokenizer import load_tokenizer, require_ids_below
from megatron_ds.data.request import DatasetRequest
from megatron_ds.errors import DataError


def open_chat(request: DatasetRequest) -> ChatDataset:
    """Open conversations, one source after the other; `request.options` are `ChatOptions`.

    Raises:
        DataError: a source, the tokenizer or its template does not fit.
    """
    options, path = request.options, request.tokenizer_path
    assert isinstance(options, ChatOptions) and path is not None, (options, path)
    if not isinstance(request.objective, Causal):
        raise DataError("data.format=chat is for causal models; for this one use data.format=text or tokenized")
    tokenizer = load_tokenizer(path)
    template: Renderer = (
        ChatTemplate(tokenizer, path, options.loss_turns == "last", options.loss_on, options.date)
        if tokenizer.chat_template
        else PlainTemplate(tokenizer, path, options.loss_on)
    )
    backend = offset_backend(tokenizer, path)
    parts = [cached_conversations(source, tokenizer, backend, template, request.cache_dir) for source in request.inputs]
    require_ids_below(request.vocab_size, max(int(part.ids.max()) for part in parts), path)
    for part in parts:
        request.placeholders.require_none_in(part)
    return ChatDataset(parts, request.seq_length, options, template.date, control_tokens(tokenizer))
