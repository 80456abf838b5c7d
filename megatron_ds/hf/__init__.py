"""Hugging Face directories, in and out: a family is a table of rows, read in both directions."""
