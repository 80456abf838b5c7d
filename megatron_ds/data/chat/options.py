"""Options of `data.format: chat`; they are keys of the `data` section itself."""

from typing import Literal

from megatron_ds.config.schema_base import Section

FIELDS = (
    "messages",
    "prompt",
    "completion",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
)
"""Fields of a conversation, in any of its forms."""


class ChatOptions(Section):
    """Options of conversations: the turns that carry loss, overlong conversations, and packing.

    Attributes:
        loss_turns: loss on all of the assistant's turns, or on the last one of each conversation.
        overlong: how conversations of more than `data.seq_length` tokens are handled.
        packing: whether several conversations share a sample.
    """

    loss_turns: Literal["all", "last"] = "all"
    overlong: Literal["refuse", "drop", "cut"] = "refuse"
    packing: bool = False
