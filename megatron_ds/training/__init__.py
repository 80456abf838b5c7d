"""Training: from a run file to metrics, checkpoints and a Hugging Face directory."""
