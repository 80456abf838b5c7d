"""The `tokenized` format: examples of token ids in transformers' convention, for every kind of model."""
