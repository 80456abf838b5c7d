"""Training objectives as far as data is concerned: which columns a sample has and what is hidden in it.

Each objective belongs to a kind of model: `Causal` (GPT-like), `Masked` (BERT, Devlin et al. 2019; RoBERTa, Liu et al.
2019) and `Seq2Seq` (T5, Raffel et al. 2020); `Labelled` to any model with a label head. Noise (masking, pairs, spans)
depends only on the objective's seed and the sample's index, and differs in every epoch.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ds.columns import LABEL, LABEL_SCORES, TARGETS, TOKEN_LABEL, Column
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


Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""The names that transformers has for what a label head predicts (`problem_type`)."""


@dataclass(frozen=True)
class Labelled:
    """Classes or scores of a text, of a pair of texts, or of the words of a text.

    Attributes:
        problem: one class of each sample, several, or scores.
        classes: names of the model's classes (of its scores), in order.
        of_words: whether each word has a class, instead of the sample.
        padding_id: the id that pads short samples.
        num_token_types: number of different `token_type_ids` of the model; samples have them if it is above 1.
        reads_last: whether the head reads the last token that is not `padding_id`.
    """

    problem: Problem
    classes: tuple[str, ...]
    of_words: bool = False
    padding_id: int = 0
    num_token_types: int = 1
    reads_last: bool = False

    @property
    def token_types(self) -> bool:
        """True if samples have `token_type_ids`."""
        return self.num_token_types > 1

    @property
    def label_column(self) -> Column:
        """The column that holds the labels."""
        if self.of_words:
            return TOKEN_LABEL
        return LABEL if self.problem == "single_label_classification" else LABEL_SCORES


DataObjective = Causal | Masked | Seq2Seq | Labelled
