"""A package outside of megatron_ds: a family, an objective, a data format and a callback of its own."""
