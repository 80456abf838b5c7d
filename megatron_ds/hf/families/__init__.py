"""Families of models: one file for each, or for a group of families that share a table."""
