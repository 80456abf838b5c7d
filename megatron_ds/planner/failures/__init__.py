"""Failures of a run, the interval of its checkpoints, and its goodput."""
