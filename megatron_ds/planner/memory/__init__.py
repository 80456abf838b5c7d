"""Memory of each rank of a pipeline stage, by part, on its device and its host."""
