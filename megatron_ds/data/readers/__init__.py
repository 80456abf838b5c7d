"""Read examples, tokenizers and cached arrays from disk."""
