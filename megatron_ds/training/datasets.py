"""The training and validation data of a run."""

from __future__ import annotations

from megatron_ds.config import RunConfig, check_target_length
from megatron_ds.data import Dataset, Order
from megatron_ds.data.labels import require_labels
from megatron_ds.errors import ConfigError
from megatron_ds.runtime.datasets import open_part
from megatron_ds.training.resolve import ResolvedRun

_FIXES = {
    "tokenized": "leave out the column 'labels' to learn every token, or give it ids other than -100",
    "chat": "check which turns carry loss with megatron-ds inspect FILE --tokenizer DIR",
}
"""Data format -> the way to labels with loss."""


def open_split(resolved: ResolvedRun, split: str) -> Dataset:
    """Open the data of a split, `train` or `valid`; the latter is read once, from its beginning to its end.

    Raises:
        ConfigError: the objective reads a label column that the data does not have.
        DataError: no label of the data carries loss.
    """
    data, train = resolved.run.data, resolved.run.train
    order = Order(train.steps * train.global_batch_size, train.seed, data.shuffle) if split == "train" else None
    found = open_part(resolved.model, data, resolved.objective.data, order, validation=split == "valid")
    check_target_length(resolved.run.parallel, found.target_length)
    _check_columns(resolved, found)
    _check_labels(resolved, found, split)
    return found


def _check_columns(resolved: ResolvedRun, data: Dataset) -> None:
    missing = [name for name in resolved.label_columns if name not in data.columns]
    if missing:
        run = resolved.run
        raise ConfigError(
            f"train.objective={run.train.objective} reads the label column {missing[0]}, which samples of "
            f"data.format={run.data.format} do not have for a {resolved.hf.family.model_type} model; they have "
            f"{', '.join(data.columns)}"
        )


def _check_labels(resolved: ResolvedRun, data: Dataset, split: str) -> None:
    section = resolved.run.data
    sources = section.valid if split == "valid" and section.valid else section.train
    names = ", ".join(source.path for source in sources)
    fix = _FIXES.get(section.format, "give some labels another value than the ignored one")
    require_labels(data, resolved.label_columns, f"data.{split}", names, fix)


def has_validation(run: RunConfig) -> bool:
    """Return whether a run has validation data: separate files, or a part of its corpora."""
    split = run.data.split
    return bool(run.data.valid) or (split is not None and len(split) > 1 and split[1] > 0)
