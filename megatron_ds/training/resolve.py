"""Resolve a run file against a world: invalid runs are refused here, before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ds.checkpoint.directory import is_checkpoint, resolve_checkpoint
from megatron_ds.config import EngineConfig, RunConfig, check_data, check_saving
from megatron_ds.data import check_format
from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.export import foreign_files
from megatron_ds.hf.weight_files import parse_size
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import head_of
from megatron_ds.runtime.loaded_model import (
    LoadedModel,
    name_checkpoints,
    open_model,
    read_model_section,
)
from megatron_ds.runtime.objective import Objective, find_objective, new_parameters
from megatron_ds.runtime.setup import EnginePlan, plan_engine
from megatron_ds.training.registered_names import check_registered_names
from megatron_ds.training.resume import check_same_model, checkpoint_folder


@dataclass(frozen=True)
class ResolvedRun:
    """A run that was checked against its model and world.

    Attributes:
        run: the run file, with folders of checkpoints replaced by the latest checkpoint in them.
        model: the model and its weights, with the objective's head.
        plan: the plan of its engine.
        objective: the training objective.
    """

    run: RunConfig
    model: LoadedModel
    plan: EnginePlan
    objective: Objective

    @property
    def hf(self) -> HFModel:
        """The Hugging Face model."""
        return self.model.hf

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns that every sample must have for the loss."""
        return head_of(self.model.layers(BuildContext())).label_columns


def resolve_run(run: RunConfig, world_size: int, device_type: str, checkpoint: Path | None = None) -> ResolvedRun:
    """Check a run against the model, the DeepSpeed config and the number of ranks.

    Args:
        run: the run file.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.
        checkpoint: the checkpoint that the run resumes, with the weights; None = the run starts.

    Raises:
        MegatronDSError: the run is invalid; the message names field, value, rule and fix.
    """
    check_format(run.data, run.model.tokenizer_path)
    check_registered_names(run, resumes=checkpoint is not None)
    run = _with_named_checkpoints(run)
    hf = read_model_section(run.model)
    plan = plan_engine(
        EngineConfig.of_run(run),
        hf,
        world_size,
        device_type,
        trains_part=run.peft is not None or bool(run.train.freeze),
    )
    check_data(run.data, run.parallel, hf.core.shape())
    _check_saving(run, plan)
    _check_paths(run)
    model = open_model(
        hf, run.model, peft=run.peft, freeze=run.train.freeze, seed=run.train.seed, checkpoint=checkpoint
    )
    if checkpoint is not None and model.adapters is None:
        assert model.weights is not None
        check_same_model(model.hf, model.weights.model, checkpoint)
    objective = find_objective(run.train.objective, model, run.data, run.train.seed)
    _check_new_parameters(run, model.hf, objective)
    return ResolvedRun(run, replace(model, change_layers=objective.layers), plan, objective)


def _with_named_checkpoints(run: RunConfig) -> RunConfig:
    """Replace folders of checkpoints, or a run's output, by the latest checkpoint in them."""
    peft = str(resolve_checkpoint(run.peft)) if isinstance(run.peft, str) else run.peft
    return run.model_copy(update={"model": name_checkpoints(run.model), "peft": peft})


def _check_saving(run: RunConfig, plan: EnginePlan) -> None:
    check_saving(run.checkpoint, plan.deepspeed)
    resume = run.checkpoint.resume
    if resume not in ("auto", "never") and not is_checkpoint(resolve_checkpoint(resume)):
        raise ConfigError(
            f"checkpoint.resume={resume} is not a checkpoint; try auto, never, or the path of one, such as "
            f"{run.output}/checkpoints/step_00000100"
        )


def _check_new_parameters(run: RunConfig, model: HFModel, objective: Objective) -> None:
    """Refuse to write a model with parameters that its Hugging Face class does not have."""
    if not run.checkpoint.every and run.export is None:
        return
    added = new_parameters(model, objective)
    if added:
        fix = "checkpoint.every=0" if run.checkpoint.every else "no export"
        raise ConfigError(
            f"train.objective={run.train.objective} trains {added[0]}, which a {model.architecture} does not have, so "
            f"that no Hugging Face directory can hold it; try {fix}"
        )


def _check_paths(run: RunConfig) -> None:
    """Refuse output paths that cannot be written, or that would replace files which the run reads or writes."""
    _check_directory("output", run.output, run)
    if run.export is None:
        return
    parse_size(run.export.max_shard_size)
    _check_directory("export.path", run.export.path, run)
    target, output = Path(run.export.path).resolve(), Path(run.output).resolve()
    if target == output or target in output.parents:
        raise ConfigError(
            f"export.path={run.export.path} would replace output={run.output}; choose another, such as {run.output}/hf"
        )
    checkpoints = checkpoint_folder(run.output).resolve()
    if checkpoints == target or checkpoints in target.parents:
        raise ConfigError(
            f"export.path={run.export.path} is inside the run's checkpoint directory; choose another, such as "
            f"{run.output}/hf"
        )
    foreign = foreign_files(target) if target.is_dir() else []
    if foreign:
        raise ConfigError(
            f"export.path={run.export.path} would be replaced, and holds {foreign[0]}, which is not a file of a model; "
            f"choose another directory"
        )


def _check_directory(field: str, path: str, run: RunConfig) -> None:
    target = Path(path).resolve()
    adapters = run.peft if isinstance(run.peft, str) else None
    sources = {"model.path": run.model.path, "model.tokenizer": run.model.tokenizer, "peft": adapters}
    for source_field, source in sources.items():
        place = Path(source).resolve() if source is not None else None
        if place is not None and (target == place or (field == "export.path" and target in place.parents)):
            raise ConfigError(f"{field}={path} would replace {source_field}={source}; choose another directory")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{field}={path} is a file; choose a directory")
    # an export is written next to its target and then renamed
    first = target.parent if field == "export.path" else target
    parent = next(place for place in (first, *first.parents) if place.exists())
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{field}={path} cannot be written ({parent} is read-only); choose another directory")
