"""From the `data:` section of a run file to a dataset. Every rank calls this; it does not communicate."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_ds.data.blend import Blend, InSuccession, Ordered, samples_of_each
from megatron_ds.data.chat import open_chat
from megatron_ds.data.dataset import Dataset
from megatron_ds.data.indexed import open_indexed
from megatron_ds.data.indexed.dataset import tokens_of
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.noise.masking import Masker, load_masker
from megatron_ds.data.objective import Causal, Masked, Objective, Seq2Seq
from megatron_ds.data.options import ChatOptions, Order, Split
from megatron_ds.data.readers.tokenizer import load_tokenizer, require_ids_below, special_id
from megatron_ds.data.text.corpus import CausalText, Corpus, TextSource, TokenStream
from megatron_ds.data.text.masked import MaskedText
from megatron_ds.data.text.sentence_pairs import SentencePairs
from megatron_ds.data.text.span_corruption import CorruptedText, find_sentinels
from megatron_ds.data.text.token_cache import cached_tokens, default_cache_dir
from megatron_ds.data.tokenized.causal import CausalExamples
from megatron_ds.data.tokenized.dataset import ExampleKind, TokenizedDataset
from megatron_ds.data.tokenized.masked import MaskedExamples
from megatron_ds.data.tokenized.seq2seq import Seq2SeqExamples
from megatron_ds.errors import DataError

FORMATS = ("text", "chat", "tokenized", "indexed")


def open_dataset(
    format: str,
    objective: Objective,
    sources: Sequence[str],
    seq_length: int,
    vocab_size: int,
    tokenizer_path: str | None = None,
    cache_dir: str | None = None,
    *,
    weights: Sequence[float] | None = None,
    order: Order | None = None,
    split: Split | None = None,
    chat: ChatOptions | None = None,
) -> Dataset:
    """The samples of `sources`, concatenated in the order given or blended, checked against the model.

    Args:
        format: one of FORMATS.
        objective: what the model is trained to do; decides the columns of a sample.
        sources: files, directories, directories saved by `datasets`, or hub ids; at least one.
        seq_length: positions a sample.
        vocab_size: number of ids of the model; every id of the data must be below it.
        tokenizer_path: directory of a tokenizer; `text` needs it, `tokenized` only to mask examples without labels.
        cache_dir: where tokens of texts are kept; None is `megatron_ds/tokens` under $XDG_CACHE_HOME or ~/.cache.
        weights: of the sources in a blend; None = one after the other.
        order: how the run goes through them; None = every sample once, in order: for validation.
        split: which part of each corpus is taken, of `indexed`; None = all.
        chat: what is learned of conversations, of `chat`.

    Raises:
        DataError: a source, the tokenizer or the format is missing, malformed or does not fit the model.
    """
    if not sources:
        raise DataError("data: no sources; name at least one file, directory or hub id under data.train")
    if format not in FORMATS:
        raise DataError(f"data.format={format!r} is not read by this version; it reads {', '.join(FORMATS)}")
    opener = _Opener(format, objective, seq_length, vocab_size, tokenizer_path, cache_dir, split, chat or ChatOptions())
    try:
        if weights is not None:
            assert order is not None, "validation takes every sample once"
            return opener.blend(sources, weights, order)
        return opener.open(sources, order)
    except OSError as error:
        raise DataError(f"data: {', '.join(sources)}: cannot be read ({error})") from error


@dataclass(frozen=True)
class _Opener:
    """All that is the same for every source; arguments as `open_dataset`."""

    format: str
    objective: Objective
    seq_length: int
    vocab_size: int
    tokenizer_path: str | None
    cache_dir: str | None
    split: Split | None
    chat: ChatOptions

    def open(self, sources: Sequence[str], order: Order | None) -> Dataset:
        """Sources one after the other; indexed ones, which have an order of their own, in shares by their tokens."""
        shared = self.objective, self.seq_length, self.vocab_size
        if self.format == "text":
            if self.tokenizer_path is None:
                raise DataError(
                    "model.tokenizer is not set, but data.format=text needs it; point it at a tokenizer directory"
                )
            opener = _TextOpener(sources, self.seq_length, self.vocab_size, self.tokenizer_path, self.directory)
            return opener.open(self.objective)
        if self.format == "chat":
            return open_chat(sources, *shared, self.tokenizer_path, self.cache_dir, self.chat)
        if self.format == "tokenized":
            return TokenizedDataset(sources, _example_kind(*shared, self.tokenizer_path))
        if len(sources) == 1:
            return open_indexed(sources[0], *shared, self.cache_dir, order, self.split)
        if order is None:
            once = [open_indexed(source, *shared, self.cache_dir, None, self.split) for source in sources]
            return InSuccession(once, sources)
        return self.blend(sources, [float(tokens_of(IndexedFile(source), self.split)) for source in sources], order)

    def blend(self, sources: Sequence[str], weights: Sequence[float], order: Order) -> Dataset:
        """Sources in shares."""
        if self.format == "text":
            for source in sources:
                TextSource(source)  # all of them are looked for before time is spent on the first
        datasets = []
        for number, (source, share) in enumerate(zip(sources, samples_of_each(weights, order.num_samples))):
            one = self.open([source], replace(order, num_samples=share))
            datasets.append(one if one.ordered else Ordered(one, order, number))
        return Blend(datasets, sources, weights, order.num_samples, self.directory)

    @property
    def directory(self) -> Path:
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()


def _example_kind(objective: Objective, seq_length: int, vocab_size: int, tokenizer_path: str | None) -> ExampleKind:
    match objective:
        case Causal():
            return CausalExamples(seq_length, vocab_size)
        case Masked():
            load = partial(_load_masker, tokenizer_path, objective, vocab_size) if tokenizer_path is not None else None
            return MaskedExamples(seq_length, vocab_size, objective, load)
        case Seq2Seq():
            return Seq2SeqExamples(seq_length, vocab_size, objective)


def _load_masker(tokenizer_path: str, objective: Masked, vocab_size: int) -> Masker:
    return load_masker(load_tokenizer(tokenizer_path), tokenizer_path, objective, vocab_size)


@dataclass(frozen=True)
class _TextOpener:
    """The `text` format: what the objectives need of the tokenizer is asked for before time is spent on the texts."""

    sources: Sequence[str]
    seq_length: int
    vocab_size: int
    tokenizer_path: str
    cache_dir: Path

    def open(self, objective: Objective) -> Dataset:
        texts = [TextSource(source) for source in self.sources]  # all of them, before time is spent on the first
        tokenizer = load_tokenizer(self.tokenizer_path)
        match objective:
            case Causal():
                return CausalText(self._corpus(texts, tokenizer, self._end_of_text(tokenizer)), self.seq_length)
            case Masked():
                masker = load_masker(tokenizer, self.tokenizer_path, objective, self.vocab_size)
                corpus = self._corpus(texts, tokenizer, masker.ids.sep)
                dataset = SentencePairs if objective.next_sentence else MaskedText
                return dataset(corpus, self.seq_length, objective, masker)
            case Seq2Seq():
                return self._open_corrupted(texts, tokenizer, objective)

    def _open_corrupted(
        self, texts: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, objective: Seq2Seq
    ) -> Dataset:
        end_id = self._end_of_text(tokenizer)
        sentinels = find_sentinels(tokenizer, self.tokenizer_path, self.seq_length, objective, self.vocab_size)
        corpus = self._corpus(texts, tokenizer, end_id)
        return CorruptedText(corpus, self.seq_length, objective, sentinels, end_id)

    def _end_of_text(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return special_id(tokenizer, self.tokenizer_path, "eos_token", "data.format=text ends each document with it")

    def _corpus(self, texts: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, end_id: int) -> Corpus:
        cached = [cached_tokens(text, tokenizer, end_id, self.cache_dir) for text in texts]
        require_ids_below(self.vocab_size, max(part.info.largest_id for part in cached), self.tokenizer_path)
        digest = hashlib.sha256("\n".join(part.key for part in cached).encode()).hexdigest()
        return Corpus(TokenStream([part.tokens for part in cached]), digest, ", ".join(self.sources))
