"""Models: lists of layers, built from a config."""
