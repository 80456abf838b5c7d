"""Examples of a sequence-to-sequence model: `input_ids`, `labels` of a length of their own, and where wanted
`attention_mask`, `decoder_input_ids` (absent = the labels shifted right) and `decoder_attention_mask`.
"""

from megatron_ds.data.dataset import IGNORE_INDEX, Sample
from megatron_ds.data.objective import Seq2Seq
from megatron_ds.data.readers.examples import Located
from megatron_ds.data.tokenized.validation import (
    SEQ2SEQ_MODELS,
    Example,
    padded,
    padded_mask,
    read_columns,
    require_equal_lengths,
    require_ids,
    require_length,
)
from megatron_ds.errors import DataError

_COLUMNS = ("input_ids", "labels", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


class Seq2SeqExamples:
    """See `ExampleKind`.

    Args:
        seq_length: S.
        vocab_size: ids must be below it.
        objective: its T, or None for S; the ids that start and pad.
    """

    def __init__(self, seq_length: int, vocab_size: int, objective: Seq2Seq) -> None:
        self.seq_length = seq_length
        self.target_length = objective.target_length or seq_length
        self._vocab_size = vocab_size
        self._objective = objective

    @property
    def identity(self) -> str:
        """What the objective says of examples; nothing is drawn for them."""
        start_id, padding_id = self._objective.decoder_start_id, self._objective.padding_id
        return f"seq2seq target_length={self.target_length} start={start_id} padding={padding_id}"

    def parse(self, located: Located) -> Example:
        """The columns; `labels` must be there."""
        example, where = read_columns(located, _COLUMNS, SEQ2SEQ_MODELS), located.where
        if "labels" not in example:
            raise DataError(f"data: {where}: no 'labels'; every example of an encoder-decoder model needs them")
        require_equal_lengths(example, where, "input_ids", ("attention_mask",))
        require_equal_lengths(example, where, "labels", ("decoder_input_ids", "decoder_attention_mask"))
        require_length(example, where, self.seq_length, "data.seq_length")
        require_length(example, where, self.target_length, "data.target_length", name="labels")
        require_ids(example, where, self._vocab_size, ("input_ids", "labels", "decoder_input_ids"))
        return example

    def count_targets(self, example: Example) -> int:
        """Labels that are not ignored."""
        return int((example["labels"] != IGNORE_INDEX).sum())

    def columns(self, given: frozenset[str], some_shorter: bool) -> tuple[str, ...]:
        """With a mask iff any example has one or is padded; with one of the decoder's iff any example has one.

        The decoder is causal: padding on the right is never looked at by what lies before it.
        """
        return (
            "input_ids",
            *(("attention_mask",) if some_shorter or "attention_mask" in given else ()),
            "decoder_input_ids",
            *(("decoder_attention_mask",) if "decoder_attention_mask" in given else ()),
            "targets",
        )

    def sample(self, example: Example, index: int) -> Sample:
        """The example padded: (S,) for the encoder, (T,) for the decoder."""
        targets = padded(example["labels"], self.target_length, IGNORE_INDEX)
        padding_id = self._objective.padding_id
        if "decoder_input_ids" in example:
            decoder_input_ids = padded(example["decoder_input_ids"], self.target_length, padding_id)
        else:
            decoder_input_ids = self._objective.decoder_inputs(targets)
        return {
            "input_ids": padded(example["input_ids"], self.seq_length, padding_id),
            "attention_mask": padded_mask(example, "attention_mask", "input_ids", self.seq_length),
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": padded_mask(example, "decoder_attention_mask", "labels", self.target_length),
            "targets": targets,
        }
