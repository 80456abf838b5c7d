"""What a model is trained to do, as far as the data must know: which columns a sample has, and what is hidden in it.

Each objective is that of a kind of model: `Causal` (GPT-like), `Masked` (BERT, Devlin et al. 2019; RoBERTa, Liu et al.
2019) and `Seq2Seq` (T5, Raffel et al. 2020). Where noise is drawn (masking, pairs, spans), it is drawn from the
objective's seed and the sample's index alone, anew in every epoch.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ds.data.dataset import IGNORE_INDEX


@dataclass(frozen=True)
class Causal:
    """Each token is predicted from those before it."""


@dataclass(frozen=True)
class Masked:
    """Hidden tokens are predicted from all others.

    Attributes:
        seed: of what is hidden and paired.
        next_sentence: whether the model also tells if the second part of a sample follows the first.
        num_token_types: how many different `token_type_ids` the model has; samples carry them where it has several.
        padding_id: the id that fills short samples.
        mask_rate: share of the tokens that are predicted.
        whole_words: whether the tokens of a word are hidden together.
    """

    seed: int
    next_sentence: bool = False
    num_token_types: int = 1
    padding_id: int = 0
    mask_rate: float = 0.15
    whole_words: bool = False

    @property
    def token_types(self) -> bool:
        """Whether samples carry `token_type_ids`."""
        return self.num_token_types > 1


@dataclass(frozen=True)
class Seq2Seq:
    """A decoder writes the target from what the encoder read; on plain text the target is spans cut out of the input.

    Attributes:
        seed: of what is cut out.
        decoder_start_id: what the decoder reads first.
        padding_id: the id that fills short samples.
        target_length: T, positions of the decoder; None chooses it.
        mask_rate: share of the tokens that are cut out.
        mean_span: mean number of tokens of a span.
    """

    seed: int
    decoder_start_id: int
    padding_id: int = 0
    target_length: int | None = None
    mask_rate: float = 0.15
    mean_span: float = 3.0

    def decoder_inputs(self, targets: np.ndarray) -> np.ndarray:
        """What the decoder reads to write `targets`: the same one later, after the start id; (T,) -> (T,).

        A target without loss is read as padding, as transformers' models do with `labels`.
        """
        before = np.concatenate([[self.decoder_start_id], targets[:-1]])
        return np.where(before == IGNORE_INDEX, self.padding_id, before).astype(np.int64)


Objective = Causal | Masked | Seq2Seq
