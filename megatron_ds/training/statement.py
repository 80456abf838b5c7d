"""A run's statement before its first step: what is learned from, when it is validated, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_ds.columns import TARGETS
from megatron_ds.config import RunConfig
from megatron_ds.data import Dataset
from megatron_ds.data.blend import SourceUsage, source_usage
from megatron_ds.data.dataset import format_count
from megatron_ds.data.labels import mean_labels


def describe_run(run: RunConfig, data: Dataset, valid: Dataset | None, label_columns: Sequence[str]) -> dict[str, str]:
    """Return the three texts of the statement by name: `learned`, `validated` and `kept`."""
    return {
        "learned": describe_learning(run, data, label_columns),
        "validated": describe_validation(run, valid),
        "kept": describe_keeping(run),
    }


def describe_learning(run: RunConfig, data: Dataset, label_columns: Sequence[str]) -> str:
    """Return how much of the data the complete run reads.

    Such as `0.38 epochs of 690 samples; 135,168 tokens with loss`, or `3 epochs of 690 samples; 2,070 labels`.

    Args:
        run: the run file.
        data: the training data.
        label_columns: columns that the loss reads; the labels with loss in them are counted in a part of the samples.
    """
    number = run.train.num_samples
    labels, is_exact = mean_labels(data, label_columns)
    usage = source_usage(data, number)
    read = describe_sources(usage) if usage else f"{format_epochs(number / len(data))} of {len(data):,} samples"
    exactly = "" if is_exact and number % len(data) == 0 else "about "
    what = "tokens with loss" if TARGETS.name in label_columns else "labels"
    text = f"{read}; {exactly}{format_count(round(labels * number))} {what}"
    if run.train.global_batch_size > len(data):
        text += f"; train.global_batch_size={run.train.global_batch_size} repeats samples in each step"
    return f"{text}; optimizer.lr=0 changes no weight" if run.optimizer.lr == 0 else text


def describe_sources(usage: Sequence[SourceUsage]) -> str:
    """Return text such as `a: 6,120 samples (0.61, wanted 0.60), 0.43 epochs; b: 3,880 samples ...`."""
    total = max(1, sum(source.samples for source in usage))
    parts = []
    for source in usage:
        fraction = f" ({source.samples / total:.2f}, wanted {source.weight:.2f})" if len(usage) > 1 else ""
        parts.append(f"{source.name}: {source.samples:,} samples{fraction}, {source.epochs:.2f} epochs")
    return "; ".join(parts)


def format_epochs(epochs: float) -> str:
    """Return a number of epochs: `1 epoch`, `0.38 epochs`, `0.0004 epochs`."""
    number = f"{epochs:.2f}".rstrip("0").rstrip(".") if epochs >= 0.01 else f"{epochs:.1g}"
    return f"{number} epoch{'' if number == '1' else 's'}"


def describe_validation(run: RunConfig, data: Dataset | None) -> str:
    """Return on what a run is validated, and when."""
    every, steps = run.train.eval_every, run.train.num_steps
    if data is None:
        return f"never: train.eval_every={every} does nothing without data.valid" if every else "never: no data.valid"
    if 0 < every < steps:
        when = _interval(every)
    else:
        reason = f"train.eval_every={every}" + (f" is more than train.steps={steps}" if every > steps else "")
        when = f"once, after the last step ({reason})" if every != steps else "once, after the last step"
    trained = {source.label for source in run.data.train}
    both = [source.label for source in run.data.valid if source.label in trained]
    shared = f"; {both[0]} is training data too" if both else ""
    return f"{when}, on {data.describe()}{shared}"


def _interval(every: int) -> str:
    """Return when something happens that is done every few steps."""
    return f"every {every:,} steps and after the last" if every > 1 else "after every step"


def describe_keeping(run: RunConfig) -> str:
    """Return what is left of the model when the run has ended."""
    kept = []
    if run.checkpoint.every:
        often = run.checkpoint.every < run.train.num_steps
        several = f"checkpoints {_interval(run.checkpoint.every)}, {run.checkpoint.keep:,} at a time"
        kept.append(several if often else "a checkpoint after the last step")
    if run.export is not None:
        kind = "adapters for peft" if run.peft is not None and not run.export.merge else "a Hugging Face directory"
        kept.append(f"{kind} after the last step: {run.export.path}")
    if kept:
        return "; ".join(kept)
    return "nothing: the trained weights are lost when the run ends; set checkpoint.every or export.path to keep them"


def describe_ends(run: RunConfig, ends: Mapping[int, str], known: Sequence[int]) -> str | None:
    """Return a line about end tokens that the data teach and the model's `generate` does not stop at; None = no such.

    Args:
        run: the run file.
        ends: special ids that are learned as an end, with their texts.
        known: ids that the model's generation settings list.
    """
    new = {token: text for token, text in ends.items() if token not in known}
    if not new or (run.export is None and not run.checkpoint.every):
        return None
    names = " and ".join(f"{text} ({token})" for token, text in new.items())
    taught = f"the data teach the model to end with {names}, at which its generation settings do not stop"
    ids = [*known, *new]
    if run.peft is not None and not (run.export is not None and run.export.merge):
        return f"{taught}; adapters have no such settings: call generate(eos_token_id={ids}), or merge them"
    return f"{taught}; eos_token_id in generation_config.json of what is kept becomes {ids}"
