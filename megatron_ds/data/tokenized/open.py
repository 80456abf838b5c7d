"""Opening `data.format: tokenized`: the kind of example follows from the objective."""

from functools import partial

from megatron_ds.data.noise.masking import Masker, load_masker
from megatron_ds.data.objective import Causal, Labelled, Masked, Seq2Seq
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.data.request import DatasetRequest
from megatron_ds.data.tokenized.causal import CausalExamples
from megatron_ds.data.tokenized.dataset import ExampleKind, TokenizedDataset
from megatron_ds.data.tokenized.masked import MaskedExamples
from megatron_ds.data.tokenized.seq2seq import Seq2SeqExamples
from megatron_ds.errors import DataError


def open_tokenized(request: DatasetRequest) -> TokenizedDataset:
    """Open examples of token ids; a tokenizer is loaded only to mask examples without labels.

    Raises:
        DataError: a source is missing or empty, or an example is malformed or does not fit the model.
    """
    return TokenizedDataset(request.inputs, _example_kind(request), request.cache_dir)


def _example_kind(request: DatasetRequest) -> ExampleKind:
    objective, seq_length, vocab_size = request.objective, request.seq_length, request.vocab_size
    match objective:
        case Causal():
            return CausalExamples(seq_length, vocab_size, request.placeholders)
        case Masked():
            path = request.tokenizer_path
            load = partial(_load_masker, path, objective, vocab_size) if path is not None else None
            return MaskedExamples(seq_length, vocab_size, objective, load)
        case Seq2Seq():
            return Seq2SeqExamples(seq_length, vocab_size, objective)
        case Labelled():
            raise DataError("data.format=tokenized has no labels for the model's head; try data.format=labelled")


def _load_masker(tokenizer_path: str, objective: Masked, vocab_size: int) -> Masker:
    return load_masker(load_tokenizer(tokenizer_path), tokenizer_path, objective, vocab_size)
