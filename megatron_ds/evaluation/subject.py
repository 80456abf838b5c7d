"""The model to evaluate and the data sets, from a run file, a run's output, a checkpoint or a directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.directory import is_checkpoint, resolve_checkpoint
from megatron_ds.config import DataSection, DataSource, ModelSection, RunConfig, build_run, build_section, load_run
from megatron_ds.errors import ConfigError
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
from megatron_ds.hub import local_directory, name_of
from megatron_ds.paths import expanded_text
from megatron_ds.runtime.loaded_model import name_directories, name_directory

RUN_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"

Source = str | Path | Mapping[str, Any]
"""A data set: a file, directory, hub id or prefix, or the keys of an entry of `data.train`."""


@dataclass(frozen=True)
class DataSet:
    """One data set that is evaluated on its own.

    Attributes:
        name: for the report.
        section: the `data` section that it is opened by.
        validation: whether it is the validation part of the section.
    """

    name: str
    section: DataSection
    validation: bool = False


@dataclass(frozen=True)
class Subject:
    """The model to evaluate, as a run describes it.

    Attributes:
        path: as it was named.
        run: the run file, with the latest checkpoint as its model or its adapters; of a directory, a run that has the
            directory as its model, and default values.
        is_run: whether a run file was named, or the output of a run.
    """

    path: str
    run: RunConfig
    is_run: bool

    @property
    def weights(self) -> str:
        """The directory that the weights are read from, of adapters theirs; an id if they are on the hub."""
        return name_of(self.run.peft if isinstance(self.run.peft, str) else str(self.run.model.path))

    def without_sequence(self) -> Subject:
        """Return the same without sequence parallelism, which divides rows of certain lengths alone."""
        parallel = self.run.parallel.model_copy(update={"sequence": False, "auto": False})
        return replace(self, run=self.run.model_copy(update={"parallel": parallel}))

    def data_sets(self, sources: Sequence[Source]) -> list[DataSet]:
        """Return the data sets to evaluate on: those named, or the validation data of the run.

        Raises:
            ConfigError: nothing is named, and the run has no validation data.
        """
        section = self.run.data
        if not sources:
            return self._validation()
        alone: dict[str, Any] = {"valid": [], "valid_share": None, "split": None, "long_context": None}
        found = []
        for source in sources:
            fields = dict(source) if isinstance(source, Mapping) else {"path": str(source)}
            one = build_section(DataSource, fields, "data")
            found.append(DataSet(one.label, section.model_copy(update={**alone, "train": [one]})))
        return found

    def _validation(self) -> list[DataSet]:
        """Return the validation data of the run, one data set for each named set."""
        section = self.run.data
        split = section.split is not None and len(section.split) > 1 and section.split[1] > 0
        if not self.is_run:
            raise ConfigError(f"{self.path} names a model without data; try --data FILE, or --tasks NAME")
        if not (section.valid or section.valid_share is not None or split):
            raise ConfigError(f"{self.path} has no validation data (data.valid); try --data FILE")
        sets = section.valid_sets if section.valid and "" not in section.valid_sets else {}
        named = {name: section.model_copy(update={"valid": sources}) for name, sources in sets.items()}
        found = [DataSet(f"data.valid.{name}", one, validation=True) for name, one in named.items()]
        return found or [DataSet("data.valid", section, validation=True)]


def find_subject(path: str | Path, overrides: Sequence[str] = ()) -> Subject:
    """Find the model that a path names, and the run that describes it.

    Args:
        path: a run file, the output of a run, a checkpoint, a folder of checkpoints, a Hugging Face directory, a
            directory of adapters, or the id of a model or of adapters on the hub. Of a run the latest checkpoint is
            evaluated; before the first one, the model that it starts from.
        overrides: `key.sub=value` with the keys of a run file.

    Raises:
        ConfigError: there is nothing to evaluate at the path, or an override is wrong.
    """
    place = Path(local_directory(expanded_text(str(path))))
    if place.is_file():
        run = load_run(place, overrides)
        return _of_run(str(path), run, Path(run.output))
    if (place / RUN_FILE).is_file() and (place / CHECKPOINTS).is_dir():
        return _of_run(str(path), load_run(place / RUN_FILE, overrides), place)
    directory = resolve_checkpoint(place)
    if not directory.is_dir():
        raise ConfigError(f"{path} does not exist; name a run file, a checkpoint or a Hugging Face directory")
    return Subject(str(path), _run_of_directory(directory, overrides), is_run=False)


def _of_run(path: str, run: RunConfig, output: Path) -> Subject:
    """Return a run with its latest checkpoint, which is a Hugging Face directory or one of adapters, in its model."""
    found, model, peft = resolve_checkpoint(output), run.model, run.peft
    if not is_checkpoint(found):
        if model.init == "random":
            raise ConfigError(
                f"{path} starts from random weights, and {output} has no checkpoint; try megatron-ds train"
            )
        model, peft = name_directories(model), name_directory("peft", peft) if isinstance(peft, str) else peft
    elif peft is not None:
        peft = str(found)
    else:
        model = ModelSection(path=str(found))
    return Subject(path, run.model_copy(update={"model": model, "peft": peft}), is_run=True)


def _run_of_directory(directory: Path, overrides: Sequence[str]) -> RunConfig:
    """Return a run that has a directory as its model, or its adapters, and default values otherwise."""
    mapping: dict[str, Any] = {"model": {"path": str(directory)}}
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file():
        base = named_base(directory)
        if not isinstance(base, str):
            raise ConfigError(
                f"{directory} holds adapters and names no base model; name a run file with its model.path"
            )
        mapping = {"model": {"path": name_directory("model.path", base)}, "peft": str(directory)}
    required = {"data": {"train": [str(directory)]}, "train": {"steps": 1}, "output": str(directory)}
    return build_run({**mapping, **required}, overrides)
