"""Training runs: read a run file, train, and write metrics, checkpoints and a Hugging Face directory."""
