"""Examples for sequence-to-sequence models: `input_ids`, `labels` of a length of their own, and optionally
`attention_mask`, `decoder_input_ids` (default: the labels shifted right) and `decoder_attention_mask`.
"""

from megatron_ds.columns import DECODER_INPUT_IDS, INPUT_IDS, TARGETS
from megatron_ds.data.dataset import Sample
from megatron_ds.data.objective import Seq2Seq
from megatron_ds.data.readers.examples import Located
from megatron_ds.data.tokenized.validation import (
    SEQ2SEQ_MODELS,
    Example,
    padded_mask,
    read_columns,
    require_equal_lengths,
    require_ids,
    require_length,
)
from megatron_ds.errors import DataError

_COLUMNS = ("input_ids", "labels", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


class Seq2SeqExamples:
    """Examples for sequence-to-sequence models; see `ExampleKind`.

    Args:
        seq_length: S.
        vocab_size: ids must be below it.
        objective: gives T, or None for S, and the start and padding ids.
    """

    def __init__(self, seq_length: int, vocab_size: int, objective: Seq2Seq) -> None:
        self.seq_length = seq_length
        self.target_length = objective.target_length or seq_length
        self._vocab_size = vocab_size
        self._objective = objective

    @property
    def identity(self) -> str:
        """The objective's settings that affect examples; there is no noise."""
        start_id, padding_id = self._objective.decoder_start_id, self._objective.padding_id
        return f"seq2seq target_length={self.target_length} start={start_id} padding={padding_id}"

    def parse(self, located: Located) -> Example:
        """Return the checked columns of an example; `labels` are required."""
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
        """Return the number of labels with loss."""
        return int(TARGETS.carries_loss(example["labels"]).sum())

    def columns(self, given: frozenset[str], some_shorter: bool) -> tuple[str, ...]:
        """Return the columns, with a mask iff any example has one or is padded, and a decoder mask iff any has one.

        The decoder is causal: no position before the padding attends to it.
        """
        return (
            "input_ids",
            *(("attention_mask",) if some_shorter or "attention_mask" in given else ()),
            "decoder_input_ids",
            *(("decoder_attention_mask",) if "decoder_attention_mask" in given else ()),
            "targets",
        )

    def sample(self, example: Example, index: int) -> Sample:
        """Return the example padded: (S,) for the encoder, (T,) for the decoder."""
        targets = TARGETS.pad(example["labels"], self.target_length)
        padding_id = self._objective.padding_id
        if "decoder_input_ids" in example:
            decoder_input_ids = DECODER_INPUT_IDS.pad(example["decoder_input_ids"], self.target_length, padding_id)
        else:
            decoder_input_ids = self._objective.decoder_inputs(targets)
        return {
            "input_ids": INPUT_IDS.pad(example["input_ids"], self.seq_length, padding_id),
            "attention_mask": padded_mask(example, "attention_mask", "input_ids", self.seq_length),
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": padded_mask(example, "decoder_attention_mask", "labels", self.target_length),
            "targets": targets,
        }
