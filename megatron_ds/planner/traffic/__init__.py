"""Bytes that each rank sends in a training step, by axis and kind."""
