"""Adapters in the format of the peft library: configs, weights, export."""
