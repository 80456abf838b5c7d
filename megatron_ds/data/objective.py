"""Training objectives as far as data is concerned: which columns a sample has and what is hidden in it.

Each objective belongs to a kind of model: `Causal` (GPT-like), `Masked` (BERT, Devlin et al. 2019; RoBERTa, Liu et al.
2019) and `Seq2Seq` (T5, Raffel et al. 2020); `Labelled` to any model with a head for labels. Noise (masking, pairs,
spans) depends only on the objective's seed and the sample's index, and differs in every epoch.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ds.columns import TARGETS
from megatron_ds.data.readers.document_frame import Begin


@dataclass(frozen=True)
class Causal:
    """Next-token prediction: each token is predicted from those before it.

    Attributes:
        bos: whether documents of text begin with special tokens, as `data.bos`; see `data.readers.document_frame`.
    """

    bos: Begin = "auto"


@dataclass(frozen=True)
class Masked:
    """Masked language modelling: hidden tokens are predicted from all others.

    Attributes:
        seed: of masks and pairs.
        next_sentence: whether the model also predicts if the second part of a sample follows the first.
        num_token_types: number of different `token_type_ids` of the model; samples have them if it is above 1.
        padding_id: the id that pads short samples.
        mask_rate: fraction of the tokens that are predicted.
        whole_words: whether all tokens of a word are hidden at once.
    """

    seed: int
    next_sentence: bool = False
    num_token_types: int = 1
    padding_id: int = 0
    mask_rate: float = 0.15
    whole_words: bool = False

    @property
    def token_types(self) -> bool:
        """True if samples have `token_type_ids`."""
        return self.num_token_types > 1


@dataclass(frozen=True)
class Seq2Seq:
    """Sequence to sequence: a decoder writes the target from the encoder's input; on plain text it writes cut spans.

    Attributes:
        seed: of the spans.
        decoder_start_id: first input of the decoder.
        padding_id: the id that pads short samples.
        target_length: T, positions of the decoder; None = chosen by the data format.
        mask_rate: fraction of the tokens that are cut out.
        mean_span: mean number of tokens of a span.
    """

    seed: int
    decoder_start_id: int
    padding_id: int = 0
    target_length: int | None = None
    mask_rate: float = 0.15
    mean_span: float = 3.0

    def decoder_inputs(self, targets: np.ndarray) -> np.ndarray:
        """Return `targets` shifted right by one behind the start id: (T,) -> (T,) int64.

        Targets without loss become padding, as transformers' models make of `labels`.
        """
        before = np.concatenate([[self.decoder_start_id], targets[:-1]])
        return np.where(before == TARGETS.ignored, self.padding_id, before).astype(np.int64)


@dataclass(frozen=True)
class Labelled:
    """Labels of a text, or of its tokens.

    Attributes:
        column: the column of labels: `label`, `label_scores` or `token_label`.
        num_labels: L, labels of the model's head.
        padding_id: the id that pads short samples; None = the model has none.
        num_token_types: number of different `token_type_ids` of the model; samples have them if it is above 1.
    """

    column: str
    num_labels: int
    padding_id: int | None = None
    num_token_types: int = 1


DataObjective = Causal | Masked | Seq2Seq | Labelled
