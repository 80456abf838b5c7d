"""Seconds of a training step: operations on a device, collectives on a network, and what hides behind what."""
