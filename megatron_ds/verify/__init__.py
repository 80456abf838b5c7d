"""Is a Hugging Face directory, run by our model on N ranks, the model that transformers runs? Numbers, not opinions."""

from megatron_ds.verify.report import Report
from megatron_ds.verify.run import verify_hf

__all__ = ["Report", "verify_hf"]
