"""Conversations as tokens: ids, and which of them carry loss, computed once and cached by content."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.chat.conversations import parse_conversation
from megatron_ds.data.chat.plain import PlainTemplate
from megatron_ds.data.chat.rendering import ChatTemplate, Rendered
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.readers.bad_rows import BAD_ARRAYS
from megatron_ds.data.readers.batched import batched
from megatron_ds.data.readers.cached_rows import CachedRows, check_rows
from megatron_ds.data.readers.examples import Located, parse_examples
from megatron_ds.data.readers.source import Source
from megatron_ds.data.readers.sources import FoundSource, find_source
from megatron_ds.data.readers.tokenizer import tokenizer_digest
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger

FORMAT_VERSION = 1
_BATCH = 512
_ARRAYS = {
    "ids": "i4 1",
    "learned": "b1 1",
    "starts": "i8 1",
    "places": "U 1",
    "notes": "U 1",
    "note_counts": "i8 1",
}
_MASKS = "-3"
"""Version of the masks, in the names of cache entries. The key is that of a run's data, which must stay resumable."""

Renderer = ChatTemplate | PlainTemplate


@dataclass(frozen=True)
class Conversations(CachedRows):
    """The conversations of one source.

    Attributes:
        learned: (T,) bool: tokens with loss.
        notes: (k,) what is given but has no effect, with `...` in place of a number of conversations.
        note_counts: (k,) int64: these numbers.
    """

    learned: np.ndarray
    notes: np.ndarray
    note_counts: np.ndarray

    @property
    def name(self) -> str:
        """The source, for messages."""
        return str(self.source)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's ids (L,) int64, and which tokens carry loss (L,) bool."""
        start, stop = self.starts[index], self.starts[index + 1]
        return self.ids[start:stop].astype(np.int64), np.asarray(self.learned[start:stop])


def cached_conversations(
    source: Source, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, template: Renderer, directory: Path
) -> Conversations:
    """Return the conversations of a source, tokenized unless `directory` holds them already. Safe for concurrent
    processes.

    Raises:
        DataError: the source is malformed, the template does not fit it, or `directory` cannot be written.
    """
    found = find_source(source, plain_text=False)
    content = f"{FORMAT_VERSION}\n{found.digest()}\n{tokenizer_digest(tokenizer, -1)}\n{template.identity}"
    key = hashlib.sha256(content.encode()).hexdigest()
    arrays = cached_arrays(
        directory,
        f"{key}{_MASKS}.chat",
        _ARRAYS,
        lambda: _make(found, backend, template),
        BAD_ARRAYS,
        partial(check_rows, of_tokens=("learned",)),
    )
    conversations = Conversations(key, source, **arrays)
    conversations.bad_rows.require_skip(source.skip_bad)
    return conversations


def tokenize(rendered: Sequence[Rendered], backend: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids (L,) and loss mask (L,) of each text: the tokens inside its spans carry loss.

    So does a token that begins before a span with white space, such as a space and a word, a control token that takes
    the white space after it, and the token that the tokenizer itself adds at the end.
    """
    adds_special_tokens = any(one.adds_special_tokens for one in rendered)
    texts = [one.text for one in rendered]
    for one, encoding in zip(rendered, backend.encode_batch(texts, add_special_tokens=adds_special_tokens)):
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        learned = np.zeros(len(offsets), dtype=bool)
        for start, end in one.spans:
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < end)
            for token in np.flatnonzero(inside & ((offsets[:, 0] < start) | (offsets[:, 1] > end))).tolist():
                first, stop = offsets[token].tolist()
                is_control = backend.id_to_token(encoding.ids[token]) == one.text[first:end]
                inside[token] = not one.text[first:start].strip() and (stop <= end or is_control)
            learned |= inside
        if one.adds_special_tokens and encoding.special_tokens_mask[-1]:
            learned[-1] = True
        yield np.asarray(encoding.ids, dtype=np.int32), learned


def offset_backend(tokenizer: PreTrainedTokenizerBase, path: str) -> Tokenizer:
    """Return the tokenizer's backend, with offsets that cover every character: some are configured to trim spaces.

    Raises:
        DataError: the tokenizer has no backend, and so no offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {path}: gives no positions of its tokens in the text, but data.format=chat needs them; "
            "convert it to a fast tokenizer (tokenizer.json)"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    _keep_spaces(content)
    backend = Tokenizer.from_str(json.dumps(content))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _keep_spaces(node: object) -> None:
    if isinstance(node, dict):
        if "trim_offsets" in node:
            node["trim_offsets"] = False
        for value in node.values():
            _keep_spaces(value)
    elif isinstance(node, list):
        for value in node:
            _keep_spaces(value)


def _make(found: FoundSource, backend: Tokenizer, template: Renderer) -> dict[str, np.ndarray]:
    source = found.source
    get_logger("data").info("tokenizing %s", source)
    bad, prefix = source.bad_rows(), source.prefix

    def render(located: Located) -> tuple[str, Rendered]:
        return located.where.removeprefix(prefix), template.render(parse_conversation(located))

    ids, learned, lengths, places = [], [], [0], []
    notes: Counter[str] = Counter()
    for batch in batched(parse_examples(found, render, bad), _BATCH):
        notes.update(note for _, text in batch for note in text.notes)
        for (place, _), (tokens, mask) in zip(batch, tokenize([text for _, text in batch], backend)):
            ids.append(tokens)
            learned.append(mask)
            lengths.append(len(tokens))
            places.append(place)
    if not ids:
        bad.refuse_all(source)
        raise DataError(f"data: {source}: no conversations; each line or row must hold one")
    return {
        "ids": np.concatenate(ids),
        "learned": np.concatenate(learned),
        "starts": np.cumsum(lengths, dtype=np.int64),
        "places": np.asarray(places),
        "notes": np.asarray(list(notes), dtype=np.str_),
        "note_counts": np.asarray(list(notes.values()), dtype=np.int64),
        **bad.arrays(prefix),
    }
