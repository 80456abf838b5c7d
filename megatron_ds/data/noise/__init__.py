"""Masking and span corruption, with reproducible randomness keyed by seed and sample index."""
