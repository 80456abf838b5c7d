"""Evaluation: loss and perplexity of a model on data, and the tasks of lm-eval, at any layout; nothing is trained."""

from megatron_ds.evaluation.report import DataResult, Evaluation
from megatron_ds.evaluation.run import evaluate

__all__ = ["DataResult", "Evaluation", "evaluate"]
