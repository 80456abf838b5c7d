"""Evaluation: loss and perplexity of a model on data, and the tasks of lm-eval, at any layout; nothing is trained."""

from megatron_ds.evaluation.report import DataResult, Evaluation
from megatron_ds.evaluation.run import evaluate
from megatron_ds.evaluation.task_choice import Tasks

__all__ = ["DataResult", "Evaluation", "Tasks", "evaluate"]
