"""Hugging Face directories: a family is a table of rows that is applied in both directions, reading and writing."""
