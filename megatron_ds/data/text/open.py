"""Opening `data.format: text`: tokenize the sources, and choose the samples that the objective needs.

Requirements on the tokenizer are checked before time is spent on the texts.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.dataset import Dataset
from megatron_ds.data.long_context.documents import ConcatDocuments, Documents
from megatron_ds.data.noise.masking import load_masker
from megatron_ds.data.objective import Causal, Labelled, Masked, Seq2Seq
from megatron_ds.data.readers.bad_rows import total_bad_rows
from megatron_ds.data.readers.batched import batched
from megatron_ds.data.readers.document_frame import DocumentFrame, document_frame
from megatron_ds.data.readers.placeholders import Placeholders
from megatron_ds.data.readers.tokenizer import load_tokenizer, require_ids_below
from megatron_ds.data.request import DatasetRequest
from megatron_ds.data.text.causal import CausalText
from megatron_ds.data.text.corpus import Corpus, TokenStream
from megatron_ds.data.text.documents import TextSource
from megatron_ds.data.text.masked import MaskedText
from megatron_ds.data.text.sentence_pairs import SentencePairs
from megatron_ds.data.text.span_corruption import CorruptedText, find_sentinels
from megatron_ds.data.text.text_documents import TextDocuments
from megatron_ds.data.text.token_cache import CachedTokens, cached_tokens
from megatron_ds.errors import DataError

_BATCH = 1024
_END_USE = "data.format=text ends each document with it"


def open_text(request: DatasetRequest) -> Dataset:
    """Open text for a causal, a masked or a sequence-to-sequence model.

    Raises:
        DataError: a source is missing or malformed, or the tokenizer does not fit the model or the objective.
    """
    path, objective, seq_length = request.tokenizer_path, request.objective, request.seq_length
    assert path is not None, "the format needs a tokenizer"
    texts = [TextSource(source) for source in request.inputs]  # find all of them before tokenizing the first
    tokenizer = load_tokenizer(path)
    match objective:
        case Causal():
            frame = document_frame(tokenizer, path, objective.bos, _END_USE)
            return CausalText(_corpus(request, texts, tokenizer, frame), seq_length)
        case Masked():
            masker = load_masker(tokenizer, path, objective, request.vocab_size)
            corpus = _corpus(request, texts, tokenizer, DocumentFrame(end_id=masker.ids.sep))
            dataset = SentencePairs if objective.next_sentence else MaskedText
            return dataset(corpus, seq_length, objective, masker)
        case Seq2Seq():
            frame = document_frame(tokenizer, path, False, _END_USE)
            assert frame.end_id is not None
            sentinels = find_sentinels(tokenizer, path, seq_length, objective, request.vocab_size)
            corpus = _corpus(request, texts, tokenizer, frame)
            return CorruptedText(corpus, seq_length, objective, sentinels, frame.end_id)
        case Labelled():
            raise DataError("data.format=text has no labels for the model's head; try data.format=labelled")


def open_text_documents(request: DatasetRequest) -> Documents:
    """Open the documents of text for a causal model, one source after the other.

    Raises:
        DataError: a source is missing or malformed, or the tokenizer does not fit the model.
    """
    path, objective = request.tokenizer_path, request.objective
    assert path is not None, "the format needs a tokenizer"
    if not isinstance(objective, Causal):
        raise DataError("data.long_context is for causal models, which read documents from left to right; remove it")
    texts = [TextSource(source) for source in request.inputs]
    tokenizer = load_tokenizer(path)
    frame = document_frame(tokenizer, path, objective.bos, _END_USE)
    parts = _cached(request, texts, tokenizer, frame, with_lengths=True)
    return ConcatDocuments([TextDocuments(text.name, part, frame) for text, part in zip(texts, parts)])


def _corpus(
    request: DatasetRequest, texts: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, frame: DocumentFrame
) -> Corpus:
    parts = _cached(request, texts, tokenizer, frame)
    digest = hashlib.sha256("\n".join(part.key for part in parts).encode()).hexdigest()
    names = ", ".join(map(str, request.inputs))
    return Corpus(TokenStream([part.tokens for part in parts]), digest, names, frame, total_bad_rows(parts))


def _cached(
    request: DatasetRequest,
    texts: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    frame: DocumentFrame,
    *,
    with_lengths: bool = False,
) -> list[CachedTokens]:
    """Return the tokens of each source, which fit the model; log the rows that were left out."""
    assert request.tokenizer_path is not None and frame.end_id is not None
    parts = [
        cached_tokens(text, tokenizer, frame.end_id, request.cache_dir, frame.begin_ids, with_lengths=with_lengths)
        for text in texts
    ]
    require_ids_below(request.vocab_size, max(part.info.largest_id for part in parts), request.tokenizer_path)
    for text, part in zip(texts, parts):
        if request.placeholders and part.info.largest_id >= request.placeholders.smallest:
            _require_no_placeholder(request.placeholders, text, part.tokens, tokenizer)
    total_bad_rows(parts).log()
    return parts


def _require_no_placeholder(
    placeholders: Placeholders, text: TextSource, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a text that holds a placeholder; its row is found by tokenizing again, as tokens know no rows."""
    position = placeholders.find(tokens)
    if position is None:
        return
    for batch in batched(text.located(), _BATCH):
        encoded = tokenizer([document for _, document in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (where, _), ids in zip(batch, encoded):
            placeholders.require_none(np.asarray(ids, dtype=np.int64), where)
    raise placeholders.error(int(tokens[position]), text.name)  # the tokenizer's own, around each document
