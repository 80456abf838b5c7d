"""The `tokenized` format: examples that already hold token ids, one module for each objective."""
