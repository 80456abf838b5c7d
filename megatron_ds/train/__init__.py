"""Training: from a run file to metrics and a Hugging Face directory."""
