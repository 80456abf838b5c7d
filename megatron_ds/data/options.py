"""What a run asks of its data beside the samples themselves."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Order:
    """How a run goes through its data, for datasets that lay their order themselves.

    Attributes:
        num_samples: how many the run takes in all: steps times global batch.
        seed: `train.seed`.
        shuffle: `data.shuffle`.
    """

    num_samples: int
    seed: int
    shuffle: bool


@dataclass(frozen=True)
class Split:
    """A part of each corpus.

    Attributes:
        fractions: of its documents, in order, as the user wrote them: training, validation, and what neither takes.
        part: which of them.
    """

    fractions: tuple[float, ...]
    part: int


@dataclass(frozen=True)
class ChatOptions:
    """What is learned of conversations.

    Attributes:
        loss_turns: whether loss is on all of the assistant's turns or on the last one of each conversation.
        overlong: what happens to conversations of more than `data.seq_length` tokens.
        packing: whether several conversations share a sample.
    """

    loss_turns: Literal["all", "last"] = "all"
    overlong: Literal["refuse", "drop", "cut"] = "refuse"
    packing: bool = False
