"""`format: chat`: conversations, rendered by the tokenizer's own template, with loss on what the assistant says."""

from megatron_ds.data.chat.open import open_chat

__all__ = ["open_chat"]
