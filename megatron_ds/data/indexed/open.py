"""Opening `data.format: indexed`: one corpus, or several in proportion to their tokens."""

from dataclasses import replace
from pathlib import Path

from megatron_ds.data.blend import ConcatDataset, open_blend
from megatron_ds.data.dataset import Dataset
from megatron_ds.data.indexed.dataset import IndexedDataset, split_tokens
from megatron_ds.data.indexed.documents import IndexedDocuments
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.long_context.documents import ConcatDocuments, Documents
from megatron_ds.data.objective import Causal
from megatron_ds.data.request import DatasetRequest
from megatron_ds.errors import DataError
from megatron_ds.untrusted import read_json
from megatron_ds.untrusted.limits import DATA_RECORD


def open_indexed(request: DatasetRequest) -> Dataset:
    """Open indexed files: several for training are blended by their tokens, for validation read one after the other.

    Raises:
        DataError: files are missing, damaged or do not fit the model.
    """
    sources = request.sources
    if len(sources) == 1:
        return _open_corpus(request)
    if request.order is None:
        return ConcatDataset([_open_corpus(replace(request, inputs=(one,))) for one in request.inputs], sources)
    weights = [float(split_tokens(IndexedFile(source), request.split)) for source in sources]
    return open_blend(request, weights, _open_corpus)


def open_indexed_documents(request: DatasetRequest) -> Documents:
    """Open the documents of indexed files, one file after the other.

    Raises:
        DataError: files are missing, damaged or do not fit the model.
    """
    files = [_open_file(source, request) for source in request.sources]
    return ConcatDocuments(
        [IndexedDocuments(file, request.vocab_size, request.split, request.placeholders) for file in files]
    )


def _open_corpus(request: DatasetRequest) -> IndexedDataset:
    (source,) = request.sources
    return IndexedDataset(
        _open_file(source, request),
        request.seq_length,
        request.vocab_size,
        request.order,
        request.split,
        request.cache_dir,
        request.placeholders,
    )


def _open_file(source: str, request: DatasetRequest) -> IndexedFile:
    if not isinstance(request.objective, Causal):
        raise DataError("data.format=indexed is for causal models; for this one use data.format=text")
    file = IndexedFile(source)
    _check_largest_id(file, request.vocab_size)
    return file


def _check_largest_id(file: IndexedFile, vocab_size: int) -> None:
    """Check the largest id in the manifest of `prepare`, if there is one: a wrong tokenizer is found at once."""
    manifest = Path(f"{file.prefix}.json")
    try:
        content = read_json(manifest, DATA_RECORD, DataError)
    except DataError:
        return
    largest = content.get("largest_id") if isinstance(content, dict) else None
    if isinstance(largest, int) and largest >= vocab_size:
        raise DataError(
            f"data: {file.prefix}: holds ids up to {largest}, but the model's vocab_size={vocab_size} ends at "
            f"{vocab_size - 1}; prepare the data with the model's own tokenizer"
        )
