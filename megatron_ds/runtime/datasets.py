"""The data of a model: a `data` section, opened for the columns that the model's objective reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_ds import data as formats
from megatron_ds.config import DataSection, DataSource, build_section
from megatron_ds.data import DataObjective, Dataset, Order, Split, check_format, format_options, format_sources
from megatron_ds.data.blend import NamedSets
from megatron_ds.data.held_out import HeldOut
from megatron_ds.data.long_context.open import LongContext
from megatron_ds.data.mixture import plan_mixture
from megatron_ds.data.readers.placeholders import Placeholders
from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel
from megatron_ds.runtime.loaded_model import LoadedModel
from megatron_ds.runtime.objective import find_objective


def open_dataset(
    model: LoadedModel,
    sources: str | Sequence[Any],
    *,
    objective: str = "auto",
    seed: int = 1234,
    num_samples: int | None = None,
    **fields: Any,
) -> Dataset:
    """Open training data for a model. Called on every rank; does not communicate.

    Args:
        model: the model; its tokenizer reads text.
        sources: a file, directory, hub id or prefix, or a list of them; `{"path": ..., "weight": ...}` blends.
        objective: the training objective, which determines the columns of a sample; "auto" = the model's own.
        seed: seed of the noise and of the order of blends.
        num_samples: total number of samples that the loop reads: the length of blends, and of Megatron's order of
            indexed data. None = every sample once, in order.
        fields: the other keys of the run file's `data` section, such as `format="chat"`, `seq_length=512`.

    Raises:
        ConfigError: a field is invalid, or has no effect with this format or model.
        DataError: a source or the tokenizer is missing, malformed or does not fit the model.
    """
    section = build_section(DataSection, {"train": sources, **fields}, "data")
    if num_samples is None and any(source.weight is not None for source in section.train):
        raise ConfigError("a blend needs num_samples: the total number of samples that the loop reads")
    if num_samples is None and section.long_context is not None:
        raise ConfigError("data.long_context needs num_samples: the total number of samples that the loop reads")
    check_format(section, model.section.tokenizer_path)
    found = find_objective(objective, model, section, seed)
    order = None if num_samples is None else Order(num_samples, seed, section.shuffle)
    return open_part(model, section, found.data, order, samples_before=_no_steps)


def _no_steps(step: int) -> int:
    if step == 0:
        return 0
    raise ConfigError(
        f"data.train: a weight from step {step} on needs a run with steps; write numbers of tokens, such as "
        "{0: 0.7, 2B tokens: 0.3}"
    )


def open_part(
    model: LoadedModel,
    data: DataSection,
    objective: DataObjective,
    order: Order | None,
    *,
    validation: bool = False,
    samples_before: Callable[[int], int] | None = None,
) -> Dataset:
    """Open the training or the validation part of a `data` section.

    Args:
        model: the model.
        data: the `data` section.
        objective: the columns of a sample, and the noise that hides tokens.
        order: the order in which a run reads the samples; None = every sample once, in order.
        validation: True opens the validation part, False the training part.
        samples_before: number of steps -> number of samples of all these steps, for weights that change; None = a blend
            cannot be opened.
    """
    if validation and len(sets := data.valid_sets) >= 1 and "" not in sets:
        alone = {name: data.model_copy(update={"valid": [*map(_without_set, found)]}) for name, found in sets.items()}
        return NamedSets({name: open_part(model, one, objective, None, validation=True) for name, one in alone.items()})
    share = data.valid_share
    sources = data.valid if validation and data.split is None and share is None else data.train
    is_blend = any(source.weight is not None for source in sources)
    mixture = None
    if order is not None and is_blend:
        assert samples_before is not None
        mixture = plan_mixture([source.weight or 0.0 for source in sources], samples_before, data.seq_length)
    return formats.open_dataset(
        data.format,
        objective,
        format_sources(data, sources),
        data.seq_length,
        model.hf.core.vocab_size,
        model.section.tokenizer_path,
        data.cache_dir,
        weights=mixture,
        order=order,
        split=Split(tuple(data.split), int(validation)) if data.split is not None else None,
        options=format_options(data),
        held_out=HeldOut(share, validation, by_source=is_blend) if share is not None else None,
        placeholders=Placeholders(model.hf.placeholder_ids),
        long_context=LongContext(tuple(mix.items()), data.packing) if (mix := data.long_context) is not None else None,
    )


def _without_set(source: DataSource) -> DataSource:
    return source.model_copy(update={"set": None})


def check_columns(data: Dataset, columns: Sequence[str], objective: str, format: str, model: HFModel) -> None:
    """Check that samples have the label columns that an objective's loss reads.

    Args:
        data: the samples.
        columns: label columns of the head.
        objective, format: names of the objective and of the data format.
        model: the model.

    Raises:
        ConfigError: a column is missing.
    """
    missing = [name for name in columns if name not in data.columns]
    if missing:
        raise ConfigError(
            f"train.objective={objective} reads the label column {missing[0]}, which samples of "
            f"data.format={format} do not have for a {model.family.model_type} model; they have "
            f"{', '.join(data.columns)}"
        )
