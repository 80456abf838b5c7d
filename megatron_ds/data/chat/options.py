"""Options of `data.format: chat`; they are keys of the `data` section itself."""

from typing import Literal

from megatron_ds.config.data_section import DEFAULT_DATE
from megatron_ds.config.schema_base import Section

FIELDS = (
    "messages",
    "prompt",
    "completion",
    "conversations",
    "conversation",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "functions",
    "label",
)
"""Fields of a conversation, in any of its forms."""


class ChatOptions(Section):
    """Options of conversations: the turns that carry loss, the date, overlong conversations, and packing.

    Attributes:
        loss_on: loss on the assistant's turns, or on all tokens.
        loss_turns: loss on all of the assistant's turns, or on the last one of each conversation.
        date: ISO date that chat templates write as today's.
        overlong: how conversations of more than `data.seq_length` tokens are handled.
        packing: whether several conversations share a sample.
    """

    loss_on: Literal["assistant", "all"] = "assistant"
    loss_turns: Literal["all", "last"] = "all"
    date: str = DEFAULT_DATE
    overlong: Literal["refuse", "drop", "cut"] = "refuse"
    packing: bool = False
