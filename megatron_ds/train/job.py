"""A run file resolved against a world: all that can be refused is refused here, before ranks or memory are spent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.config import (
    DeepSpeedFacts,
    RunConfig,
    check_run,
    deepspeed_facts,
    fill_deepspeed,
    load_deepspeed,
)
from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.io import parse_size
from megatron_ds.hf.weights import HFWeights
from megatron_ds.parallel.grid import Layout


@dataclass(frozen=True)
class Job:
    """A run that fits its world.

    Attributes:
        run: as the user wrote it.
        model: the Hugging Face model's meaning; `tied` settled by the weights where there are any.
        weights: where they are read from; None = random initialisation.
        layout: sizes of the grid.
        deepspeed: the filled DeepSpeed config.
        facts: what it says of ZeRO, precision and offload.
    """

    run: RunConfig
    model: HFModel
    weights: HFWeights | None
    layout: Layout
    deepspeed: dict[str, Any]
    facts: DeepSpeedFacts


def resolve(run: RunConfig, world_size: int, device_type: str) -> Job:
    """Check a run against the model, the DeepSpeed config and the number of ranks.

    Raises:
        MegatronDSError: naming field, value, rule and nearest fix.
    """
    model = read_model(run.model.path if run.model.path is not None else run.model.config or {})
    mapping = load_deepspeed(run.deepspeed)
    facts = deepspeed_facts(mapping)
    data_size = check_run(run, model.decoder.shape(), facts, world_size, device_type)
    _check_recomputation(run, mapping)
    _check_paths(run)
    weights = None
    if run.model.init == "pretrained":
        assert run.model.path is not None
        weights = HFWeights(run.model.path, model)
        model = weights.model
    layout = Layout(run.parallel.tensor, run.parallel.pipeline, data_size)
    filled = fill_deepspeed(mapping, run, data_size, model.decoder.hidden_size)
    return Job(run, model, weights, layout, filled, facts)


def _check_recomputation(run: RunConfig, mapping: dict[str, Any]) -> None:
    section = mapping.get("activation_checkpointing") or {}
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


def _check_paths(run: RunConfig) -> None:
    """Refuse to write where nothing can be written, or over the model that is read."""
    places = {"output": run.output}
    if run.export is not None:
        places["export.path"] = run.export.path
        parse_size(run.export.max_shard_size)
    for field, path in places.items():
        target = Path(path)
        if run.model.path is not None and target.resolve() == Path(run.model.path).resolve():
            raise ConfigError(f"{field}={path} is model.path itself; choose another directory")
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{field}={path} is a file; choose a directory")
        parent = next(place for place in (target, *target.resolve().parents) if place.exists())
        if not os.access(parent, os.W_OK):
            raise ConfigError(f"{field}={path} cannot be written ({parent} is read-only); choose another directory")
    if run.export is not None and Path(run.export.path).is_dir():
        held = {file.name for file in Path(run.export.path).iterdir()}
        if held and "config.json" not in held:
            raise ConfigError(
                f"export.path={run.export.path} holds other files and would be replaced; choose another directory"
            )
