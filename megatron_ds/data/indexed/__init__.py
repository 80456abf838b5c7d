"""`format: indexed`: Megatron's `.bin` and `.idx` files, in the order in which Megatron's GPTDataset takes them."""

from megatron_ds.data.indexed.open import open_indexed

__all__ = ["open_indexed"]
