"""The training and validation data of a run."""

from __future__ import annotations

from megatron_ds.config import RunConfig, check_target_length
from megatron_ds.data import Dataset, Order
from megatron_ds.errors import ConfigError
from megatron_ds.runtime.datasets import open_part
from megatron_ds.training.resolve import ResolvedRun


def open_split(resolved: ResolvedRun, split: str) -> Dataset:
    """Open the data of a split, `train` or `valid`; the latter is read once, from its beginning to its end.

    Raises:
        ConfigError: the objective reads a label column that the data does not have.
    """
    data, train = resolved.run.data, resolved.run.train
    order = Order(train.steps * train.global_batch_size, train.seed, data.shuffle) if split == "train" else None
    found = open_part(resolved.model, data, resolved.objective.data, order, validation=split == "valid")
    check_target_length(resolved.run.parallel, found.target_length)
    _check_columns(resolved, found)
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


def has_validation(run: RunConfig) -> bool:
    """Return whether a run has validation data: separate files, or a part of its corpora."""
    split = run.data.split
    return bool(run.data.valid) or (split is not None and len(split) > 1 and split[1] > 0)
