"""The training and validation data of a run."""

from __future__ import annotations

from dataclasses import replace

from megatron_ds.columns import TARGETS
from megatron_ds.config import RunConfig, check_target_length
from megatron_ds.data import Dataset, Order
from megatron_ds.data.chat.ends import control_tokens
from megatron_ds.data.labels import require_labels, sampled_ends
from megatron_ds.data.parts import ends_of
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.errors import DataError
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks
from megatron_ds.runtime.datasets import check_columns, open_part
from megatron_ds.training.resolve import ResolvedRun

_FIXES = {
    "tokenized": "leave out the column 'labels' to learn every token, or give it ids other than -100",
    "chat": "check which turns carry loss with megatron-ds inspect FILE --tokenizer DIR",
}
"""Data format -> the way to labels with loss."""


def open_data(resolved: ResolvedRun) -> tuple[ResolvedRun, Dataset, Dataset | None]:
    """Open the training and the validation data of a run.

    Returns:
        the run, with the number of steps that follows from `train.epochs`; its training data; its validation data,
        None if it has none.

    Raises:
        ConfigError, DataError: see `open_epochs` and `open_split`.
    """
    if resolved.run.train.epochs is not None:
        resolved, train_data = open_epochs(resolved)
    else:
        train_data = open_split(resolved, "train")
    return resolved, train_data, open_split(resolved, "valid") if has_validation(resolved.run) else None


def open_split(resolved: ResolvedRun, split: str) -> Dataset:
    """Open the data of a split, `train` or `valid`; the latter is read once, from its beginning to its end.

    Raises:
        ConfigError: the objective reads a label column that the data does not have.
        DataError: no label of the data carries loss.
    """
    data, train = resolved.run.data, resolved.run.train
    order = Order(train.num_samples, train.seed, data.shuffle) if split == "train" else None
    found = open_part(
        *(resolved.model, data, resolved.objective.data, order),
        validation=split == "valid",
        samples_before=lambda steps: train.batch_sizes.samples_before(steps + 1),
    )
    return _checked(resolved, found, split)


def _checked(resolved: ResolvedRun, data: Dataset, split: str) -> Dataset:
    """Return the data of a split, which fit the run."""
    check_target_length(resolved.run.parallel, data.target_length)
    run = resolved.run
    check_columns(data, resolved.label_columns, run.train.objective, run.data.format, resolved.hf)
    _check_labels(resolved, data, split)
    return data


def open_epochs(resolved: ResolvedRun) -> tuple[ResolvedRun, Dataset]:
    """Open the training data of a run with `train.epochs`, and return the run with the steps that follow.

    Data that depend on the number of steps, such as indexed ones, are opened a second time.

    Raises:
        ConfigError: see `RunConfig.with_steps` and `open_split`.
        DataError: no label of the data carries loss.
    """
    data = open_part(resolved.model, resolved.run.data, resolved.objective.data, None)
    counted = replace(resolved, run=resolved.run.with_steps(len(data)))
    return counted, open_split(counted, "train") if data.ordered else _checked(counted, data, "train")


def _check_labels(resolved: ResolvedRun, data: Dataset, split: str) -> None:
    section = resolved.run.data
    sources = section.valid if split == "valid" and section.valid else section.train
    names = ", ".join(source.path for source in sources)
    fix = _FIXES.get(section.format, "give some labels another value than the ignored one")
    require_labels(data, resolved.label_columns, f"data.{split}", names, fix)


def has_validation(run: RunConfig) -> bool:
    """Return whether a run has validation data: separate files, or a part of its training data."""
    split = run.data.split
    return (
        bool(run.data.valid)
        or run.data.valid_share is not None
        or (split is not None and len(split) > 1 and split[1] > 0)
    )


def taught_ends(resolved: ResolvedRun, data: Dataset) -> dict[int, str]:
    """Return the special ids that the training data teach as an end of generated text, with their texts.

    Formats that put them there know them; in token ids they are found with the tokenizer, if there is one.
    """
    if not resolved.hf.core.generates:
        return {}
    known, path = ends_of(data), resolved.run.model.tokenizer_path
    if known or path is None or TARGETS.name not in data.columns:
        return known
    try:
        tokenizer = load_tokenizer(path)
    except DataError:  # token ids need none
        return {}
    return sampled_ends(data, control_tokens(tokenizer))


def check_same_data(data: Dataset, run: RunConfig) -> None:
    """Check that all ranks have the same training data, and so the same number of steps. Collective over the world.

    Raises:
        DataError: on rank 0, if files of one name differ on the machines of a run; see `run_on_all_ranks`.
    """
    everyone = gather_objects((data.fingerprint, run.train.num_steps, data.describe()))

    def compare() -> None:
        for rank, other in enumerate(everyone):
            if other[:2] != everyone[0][:2]:
                raise DataError(
                    f"data.train is not the same on all ranks: {everyone[0][2]} on rank 0, {other[2]} on rank {rank}; "
                    "copy the same files to all machines"
                )

    run_on_all_ranks(compare)
