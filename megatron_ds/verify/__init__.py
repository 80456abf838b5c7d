"""Verification: compare a Hugging Face directory, run by our model on N ranks, with transformers."""

from megatron_ds.verify.report import Report
from megatron_ds.verify.run import verify_hf

__all__ = ["Report", "verify_hf"]
