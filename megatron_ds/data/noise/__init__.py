"""Masking and span corruption, with reproducible random numbers keyed by seed and sample index."""
