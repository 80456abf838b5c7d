"""The `text` format: documents to token streams to samples, one module for each objective."""
