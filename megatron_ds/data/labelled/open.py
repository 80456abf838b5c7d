"""Opening `data.format: labelled`."""

from megatron_ds.data.labelled.cache import cached_rows
from megatron_ds.data.labelled.dataset import LabelledDataset
from megatron_ds.data.labelled.encoding import RowEncoder
from megatron_ds.data.objective import Labelled
from megatron_ds.data.readers.tokenizer import load_tokenizer, require_ids_below, tokenizer_digest
from megatron_ds.data.request import DatasetRequest
from megatron_ds.errors import DataError


def open_labelled(request: DatasetRequest) -> LabelledDataset:
    """Open labelled rows, one source after the other.

    Raises:
        DataError: a source or the tokenizer does not fit the model.
    """
    path, objective = request.tokenizer_path, request.objective
    assert path is not None and isinstance(objective, Labelled), (path, objective)
    tokenizer = load_tokenizer(path)
    _check_padding(tokenizer.pad_token_id, objective, path)
    encoder = RowEncoder(tokenizer, path, request.seq_length, objective.of_words)
    digest = tokenizer_digest(tokenizer, -1)
    parts = [cached_rows(source, objective, encoder, digest, request.cache_dir) for source in request.inputs]
    for part in parts:
        request.placeholders.require_none_in(part)
    require_ids_below(request.vocab_size, max(int(part.ids.max()) for part in parts), path)
    largest_type = max(int(part.types.max()) for part in parts)
    if objective.token_types and largest_type >= objective.num_token_types:
        raise DataError(
            f"tokenizer {path}: gives token_type_ids up to {largest_type}, but the model's type_vocab_size="
            f"{objective.num_token_types} ends at {objective.num_token_types - 1}; use the model's own tokenizer"
        )
    return LabelledDataset(parts, request.seq_length, objective)


def _check_padding(pads_with: int | None, objective: Labelled, path: str) -> None:
    """Refuse a tokenizer whose padding the head takes for text, as transformers would in batches."""
    if objective.reads_last and pads_with not in (None, objective.padding_id):
        raise DataError(
            f"tokenizer {path}: pads with the id {pads_with}, but the model's pad_token_id={objective.padding_id} "
            f"finds the last token; nearest: model.head.pad_token_id={pads_with}, or pad_token_id in config.json"
        )
