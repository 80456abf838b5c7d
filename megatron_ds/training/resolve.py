"""Resolve a run file against a world: invalid runs are refused here, before anything is allocated."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ds.checkpoint.directory import checkpoints_in, is_checkpoint, resolve_checkpoint
from megatron_ds.config import (
    RunConfig,
    check_ramped_lengths,
    check_repeats,
    check_saving,
    load_deepspeed,
    summarize_deepspeed,
)
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.data import check_format
from megatron_ds.data.objective import Causal
from megatron_ds.engine import DeviceSettings
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hf.export_target import TRAINING_STATE, ExportTarget, covers
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
from megatron_ds.hf.weight_files import parse_size
from megatron_ds.log import log_once
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import head_of
from megatron_ds.monitor.report import REPORT
from megatron_ds.runtime.loaded_model import (
    LoadedModel,
    open_model,
    read_model_section,
)
from megatron_ds.runtime.objective import Objective, find_objective, new_parameters
from megatron_ds.runtime.optimizer_groups import grouped_parameters
from megatron_ds.runtime.setup import EnginePlan, plan_run
from megatron_ds.training.model_paths import with_directories
from megatron_ds.training.registered_names import check_registered_names
from megatron_ds.training.resume import RUN_FILE, check_same_model, checkpoint_folder
from megatron_ds.training.run_output import DATA_USAGE, LOSS_PLOT
from megatron_ds.untrusted import read_text
from megatron_ds.untrusted.limits import RUN_FILE as RUN_LIMITS

MODEL_PARTS = ("config.json", ADAPTER_CONFIG, TRAINING_STATE, MARK)  # of models, adapters, checkpoints and exports
REPLACED = (RUN_FILE, DATA_USAGE, LOSS_PLOT, REPORT)  # in an output; earlier metrics and checkpoints are kept


@dataclass(frozen=True)
class ResolvedRun:
    """A run that was checked against its model and world.

    Attributes:
        run: the run file, with the directories that its paths and ids of models name; see `with_directories`.
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
    run = with_directories(run, checkpoint)
    hf = read_model_section(run.model)
    plan = plan_engine_of(run, hf, world_size, device_type)
    _check_saving(run, plan)
    _check_paths(run)
    model = open_model(
        hf, run.model, peft=run.peft, freeze=run.train.freeze, seed=run.train.seed, checkpoint=checkpoint
    )
    if checkpoint is not None and model.adapters is None:
        assert model.weights is not None
        check_same_model(model.hf, model.weights.model, checkpoint)
    grouped_parameters(model, run.optimizer)
    objective = find_objective(run.train.objective, model, run.data, run.train.seed)
    check_ramped_lengths(run, plan.context, is_causal=isinstance(objective.data, Causal))
    _check_new_parameters(run, model.hf, objective)
    return ResolvedRun(run, replace(model, change_layers=objective.layers), plan, objective)


def plan_engine_of(run: RunConfig, hf: HFModel, world_size: int, device_type: str) -> EnginePlan:
    """Check a run against its model's config and the number of ranks; no files of weights or data are read.

    Args:
        run: the run file.
        hf: the model of its `model` section.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.

    Raises:
        ConfigError, TopologyError: see `plan_run`.
    """
    plan = plan_run(run, hf, world_size, device_type)
    device_settings(run).check_precision(plan.summary.precision)
    _check_rope_length(run, hf)
    return plan


def device_settings(run: RunConfig) -> DeviceSettings:
    """Return the settings of the devices of a run's ranks.

    Raises:
        ConfigError: the DeepSpeed JSON is invalid.
    """
    stage = summarize_deepspeed(load_deepspeed(run.deepspeed)).zero_stage
    return DeviceSettings(run.parallel.tensor, stage, run.train.deterministic, run.train.tf32)


def _check_rope_length(run: RunConfig, hf: HFModel) -> None:
    """Refuse sequences that are longer than the stretched positions; "dynamic" stretches to any length.

    Without `model.rope` they are noted: if it was forgotten, nothing but the loss would show it.
    """
    length, longest = run.data.seq_length, getattr(hf.config, "max_position_embeddings", None)
    rotates = any(any(stack.rotary) for stack in hf.core.stacks.values())
    if longest is None or length <= longest or not rotates or "dynamic" in hf.core.shape().length_ropes:
        return
    if run.model.rope is None:
        log_once(
            f"data.seq_length={length} is more than max_position_embeddings={longest} of config.json, which exports "
            "keep; model.rope stretches the model to longer texts"
        )
        return
    raise ConfigError(
        f"data.seq_length={length} is more than the {longest} positions that model.rope gives; nearest: {longest}, "
        f"or a larger model.rope.factor, or model.rope.max_position_embeddings={length}"
    )


def _check_saving(run: RunConfig, plan: EnginePlan) -> None:
    check_saving(run.checkpoint, run.train, plan.deepspeed)
    check_repeats(run.train, plan.summary.zero_stage)
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


def export_target(run: RunConfig) -> ExportTarget:
    """Return the directory that a run exports to. Nothing that the run reads is replaced.

    Args:
        run: a run file with an `export` section.
    """
    assert run.export is not None
    resume = run.checkpoint.resume if run.checkpoint.resume not in ("auto", "never") else None
    read = {**_models_read(run), "checkpoint.resume": resume}
    kept = {f"{field}={path}": Path(path) for field, path in read.items() if path is not None}
    kept |= {f"{source.path}, which holds data": Path(source.path) for source in (*run.data.train, *run.data.valid)}
    if isinstance(run.peft, str) and (Path(run.peft) / ADAPTER_CONFIG).is_file():
        base = named_base(Path(run.peft))
        kept |= {f"{base}, the base of peft={run.peft}": Path(base)} if isinstance(base, str) else {}
    return ExportTarget(Path(run.export.path), "export.path", run.export.overwrite, "export.overwrite=true", kept)


def _models_read(run: RunConfig) -> dict[str, str | None]:
    peft = run.peft if isinstance(run.peft, str) else None
    return {"model.path": run.model.path, "model.tokenizer": run.model.tokenizer, "peft": peft}


def _check_paths(run: RunConfig) -> None:
    """Refuse output paths that cannot be written, or that would replace files which the run reads or writes."""
    _check_output(run)
    if run.export is None:
        return
    parse_size(run.export.max_shard_size)
    target, nearest = export_target(run), f"choose another, such as {run.output}/hf"
    if covers(target.path, Path(run.output)):
        raise ConfigError(f"{target.label} would replace output={run.output}; {nearest}")
    if covers(checkpoint_folder(run.output), target.path):
        raise ConfigError(f"{target.label} is inside the run's checkpoint directory; {nearest}")
    try:
        target.check()
    except ConversionError as problem:
        raise ConfigError(str(problem)) from problem
    _check_writable("export.path", run.export.path, target.place.parent)  # it is written next to its target


def _check_output(run: RunConfig) -> None:
    """Refuse an output directory whose files a run would overwrite, or that is no directory."""
    output = Path(run.output)
    for field, path in _models_read(run).items():
        if path is not None and covers(output, Path(path)) and covers(Path(path), output):
            raise ConfigError(f"output={run.output} would replace {field}={path}; choose another directory")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={run.output} is a file; choose a directory")
    _check_writable("output", run.output, output.resolve())
    found = next((name for name in MODEL_PARTS if (output / name).exists()), None)
    if found is not None:
        raise ConfigError(
            f"output={run.output} holds {found} of a model, and a run would write its own files there; choose another "
            f"directory, such as {run.output}/run"
        )
    has_run = _is_run_file(output / RUN_FILE) or any(map(is_checkpoint, checkpoints_in(checkpoint_folder(run.output))))
    found = None if has_run else next((n for n in REPLACED if (output / n).is_file()), None)
    if found is not None:
        raise ConfigError(
            f"output={run.output} holds {found}, which is of no run and would be replaced; choose another directory, "
            f"such as {run.output}/run"
        )


def _is_run_file(path: Path) -> bool:
    try:
        content = parse_yaml(read_text(path, RUN_LIMITS, ConfigError), str(path))
    except ConfigError:
        return False
    return isinstance(content, dict) and {"model", "data", "output"} <= content.keys()


def _check_writable(field: str, path: str, place: Path) -> None:
    """Check by a trial that a directory can be made in the nearest folder that exists; rights alone do not tell."""
    parent = next(found for found in (place, *place.parents) if found.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".megatron_ds-", dir=parent):
            pass
    except OSError as problem:
        reason = "is not a directory" if not parent.is_dir() else f"takes no directory: {problem.strerror or problem}"
        raise ConfigError(f"{field}={path} cannot be written ({parent} {reason}); choose another place") from problem
