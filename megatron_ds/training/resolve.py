"""A run file resolved against a world: all that can be refused is refused here, before ranks or memory are spent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ds.checkpoint.directory import is_checkpoint, resolve_checkpoint
from megatron_ds.config import (
    DeepSpeedSummary,
    RunConfig,
    check_run,
    fill_deepspeed,
    load_deepspeed,
    summarize_deepspeed,
)
from megatron_ds.data import Objective
from megatron_ds.engine import ShardReader
from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel, read_json, read_model
from megatron_ds.hf.export import not_ours
from megatron_ds.hf.peft.adapters import Adapters, AdapterWeights
from megatron_ds.hf.peft.config import ADAPTER_CONFIG
from megatron_ds.hf.weight_files import parse_size
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import ParamSpec, initial_shard
from megatron_ds.models.adapters import with_adapters
from megatron_ds.models.build import model_layers
from megatron_ds.models.config import EncoderDecoderConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec
from megatron_ds.parallel.grid import Layout
from megatron_ds.training.adapters import open_adapters, refuse_adapters
from megatron_ds.training.freeze import frozen_parameters
from megatron_ds.training.objective import objective_of
from megatron_ds.training.resume import check_same_model, checkpoint_folder


@dataclass(frozen=True)
class ResolvedRun:
    """A run that fits its world.

    Attributes:
        run: as the user wrote it, `latest` checkpoints named.
        model: the Hugging Face model's meaning; `tied` settled by the weights where there are any.
        weights: where they are read from; None = random initialisation.
        objective: what it is trained to do.
        layout: sizes of the grid.
        deepspeed: the filled DeepSpeed config.
        facts: what it says of ZeRO, precision and offload.
        frozen: our names of the parameters that are not trained.
        adapters: what is trained beside the model, which then is not.
        adapter_weights: where they are read from; None = they begin anew.
    """

    run: RunConfig
    model: HFModel
    weights: HFWeights | None
    objective: Objective
    layout: Layout
    deepspeed: dict[str, Any]
    facts: DeepSpeedSummary
    frozen: frozenset[str] = frozenset()
    adapters: Adapters | None = None
    adapter_weights: AdapterWeights | None = None

    def layers(self, ctx: BuildContext) -> list[LayerSpec]:
        """The model's stages, unbuilt, with their adapters."""
        layers = model_layers(self.model.core, ctx)
        return layers if self.adapters is None else with_adapters(layers, self.adapters.places)

    @property
    def read_shard(self) -> ShardReader | None:
        """Where the parameters' values come from; None = all begin at random."""
        return self._read_shard if self.weights is not None else None

    def _read_shard(self, name: str, spec: ParamSpec, rank: int, size: int) -> Tensor:
        if self.adapters is None or name not in self.adapters.table:
            assert self.weights is not None
            return self.weights.share(name, spec, rank, size)
        if self.adapter_weights is not None:
            return self.adapter_weights.share(name, spec, rank, size)
        return initial_shard(name, spec, self.run.train.seed, rank, size)


def resolve_run(run: RunConfig, world_size: int, device_type: str, checkpoint: Path | None = None) -> ResolvedRun:
    """Check a run against the model, the DeepSpeed config and the number of ranks.

    Args:
        run: the run.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.
        checkpoint: what it goes on from: the weights are read there.

    Raises:
        MegatronDSError: naming field, value, rule and nearest fix.
    """
    run = _with_named_checkpoint(run)
    _check_base(run)
    model = read_model(run.model.path if run.model.path is not None else run.model.config or {})
    mapping = load_deepspeed(run.deepspeed)
    facts = summarize_deepspeed(mapping)
    data_size = check_run(run, model.core.shape(), facts, world_size, device_type)
    _check_recomputation(run, mapping, model)
    _check_saving(run, mapping)
    _check_paths(run)
    weights = None
    if run.model.init == "pretrained":
        assert run.model.path is not None
        weights = HFWeights(run.model.path, model)
        model = weights.model
    adapters = adapter_weights = None
    if run.peft is not None:
        adapters, adapter_weights = open_adapters(run, model, checkpoint)
    elif checkpoint is not None:
        refuse_adapters(checkpoint)
        weights = HFWeights(checkpoint, read_model(checkpoint))
        check_same_model(model, weights.model, checkpoint)
    layout = Layout(run.parallel.tensor, run.parallel.pipeline, data_size)
    filled = fill_deepspeed(mapping, run, data_size, model.core.hidden_size)
    frozen = frozen_parameters(model, run.train.freeze) if adapters is None else frozenset(model.table)
    objective = objective_of(model, run)
    return ResolvedRun(run, model, weights, objective, layout, filled, facts, frozen, adapters, adapter_weights)


def _with_named_checkpoint(run: RunConfig) -> RunConfig:
    """Where `model` names a folder of checkpoints, or a run's output: the latest one in it."""
    named = {
        field: str(resolve_checkpoint(path))
        for field, path in (("path", run.model.path), ("tokenizer", run.model.tokenizer))
        if path is not None
    }
    peft = str(resolve_checkpoint(run.peft)) if isinstance(run.peft, str) else run.peft
    return run.model_copy(update={"model": run.model.model_copy(update=named), "peft": peft})


def _check_base(run: RunConfig) -> None:
    path = run.model.path
    if path is not None and (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file():
        base = read_json(Path(path) / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ConfigError(f"model.path={path} is an adapter; nearest: model.path={base} and peft={path}")


def _check_recomputation(run: RunConfig, mapping: dict[str, Any], model: HFModel) -> None:
    section = mapping.get("activation_checkpointing") or {}
    if section and run.train.recompute != "none" and (run.peft is not None or run.train.freeze):
        raise ConfigError(
            "deepspeed.activation_checkpointing recomputes nothing of a layer whose input needs no gradient, as behind "
            f"a frozen embedding; nearest: remove it, and train.recompute={run.train.recompute} is torch's own"
        )
    if section.get("partition_activations") and isinstance(model.core, EncoderDecoderConfig):
        raise ConfigError(
            "deepspeed.activation_checkpointing.partition_activations=true empties what a layer is given, and the "
            f"encoder's states of a {model.family.model_type} are given to all layers of its decoder; nearest: false"
        )
    for key in ("cpu_checkpointing", "contiguous_memory_optimization"):
        if section.get(key) and not section.get("partition_activations"):
            raise ConfigError(
                f"deepspeed.activation_checkpointing.{key}=true works on partitioned activations only; nearest: "
                f"partition_activations=true beside it"
            )
    if section.get("contiguous_memory_optimization") and not section.get("number_checkpoints"):
        raise ConfigError(
            "deepspeed.activation_checkpointing.contiguous_memory_optimization=true needs number_checkpoints; nearest: "
            "the number of layers"
        )
    if section.get("partition_activations") and run.train.recompute == "selective":
        raise ConfigError(
            "deepspeed.activation_checkpointing.partition_activations=true splits what all tensor ranks hold alike; "
            "train.recompute=selective keeps each rank's own heads; nearest: train.recompute=full"
        )
    if section.get("partition_activations") and run.parallel.sequence and run.parallel.tensor > 1:
        raise ConfigError(
            "deepspeed.activation_checkpointing.partition_activations=true splits what all tensor ranks hold alike; "
            "with parallel.sequence=true they hold different parts already; set one of them to false"
        )
    if (mapping.get("pipeline") or {}).get("activation_checkpoint_interval"):
        raise ConfigError(
            "deepspeed.pipeline.activation_checkpoint_interval would recompute a second time what train.recompute "
            "does; remove it and set train.recompute=full"
        )


def _check_saving(run: RunConfig, mapping: dict[str, Any]) -> None:
    zero = mapping.get("zero_optimization") or {}
    for key in ("offload_optimizer", "offload_param"):
        if run.checkpoint.every and (zero.get(key) or {}).get("device") == "nvme":
            raise ConfigError(
                f"deepspeed.zero_optimization.{key}.device=nvme cannot be saved yet; nearest: cpu, or "
                "checkpoint.every=0"
            )
    resume = run.checkpoint.resume
    if resume not in ("auto", "never") and not is_checkpoint(resolve_checkpoint(resume)):
        raise ConfigError(
            f"checkpoint.resume={resume} is no checkpoint; nearest: auto, never, or the path of one, such as "
            f"{run.output}/checkpoints/step_00000100"
        )


def _check_paths(run: RunConfig) -> None:
    """Refuse to write where nothing can be written, or over what the run reads or writes."""
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
    kept = checkpoint_folder(run).resolve()
    if kept == target or kept in target.parents:
        raise ConfigError(
            f"export.path={run.export.path} is among the run's checkpoints; choose another, such as {run.output}/hf"
        )
    strangers = not_ours(target) if target.is_dir() else []
    if strangers:
        raise ConfigError(
            f"export.path={run.export.path} would be replaced, and holds {strangers[0]}, which is no file of a model; "
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
    # an export is made beside its target and put in its place
    first = target.parent if field == "export.path" else target
    parent = next(place for place in (first, *first.parents) if place.exists())
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{field}={path} cannot be written ({parent} is read-only); choose another directory")
