"""The grid of ranks, the collectives of tensor parallelism, and random numbers per axis."""
