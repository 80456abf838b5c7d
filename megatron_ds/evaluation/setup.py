"""The plan of an evaluation: model, weights' precision, ranks and batches, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ds.config import (
    EngineConfig,
    check_context_length,
    check_data,
    check_layout,
    load_deepspeed,
    summarize_deepspeed,
)
from megatron_ds.data import check_format
from megatron_ds.dtypes import TRAINED
from megatron_ds.engine import DeviceSettings
from megatron_ds.errors import ConfigError, TopologyError, not_one_of
from megatron_ds.evaluation.subject import DataSet, Subject
from megatron_ds.hf.config import HFModel
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import ChangeLayers, head_of
from megatron_ds.runtime.loaded_model import LoadedModel, open_model, read_model_section
from megatron_ds.runtime.objective import Objective, find_objective
from megatron_ds.runtime.setup import EnginePlan, plan_engine

PRECISIONS = {row.name: row.precision for row in TRAINED}
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """Choices of an evaluation besides model and data.

    Attributes:
        dtype: of the weights in memory: "float32", "bfloat16", "float16"; "auto" = of a run as it trains, of a
            directory as its config.json says.
        batch_size: rows of a forward pass on one rank.
    """

    dtype: str = AUTO
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.dtype not in (AUTO, *PRECISIONS):
            raise ConfigError(f"dtype={self.dtype} {not_one_of(self.dtype, (AUTO, *PRECISIONS))}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} is not at least 1; nearest: 1")


@dataclass(frozen=True)
class Prepared:
    """A checked evaluation.

    Attributes:
        model: the model, with the layers that are evaluated.
        plan: the plan of its engine.
        objective: of the data sets; None without data sets.
    """

    model: LoadedModel
    plan: EnginePlan
    objective: Objective | None

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns that every sample must have for the loss."""
        return head_of(self.model.layers(BuildContext())).label_columns


def prepare(
    subject: Subject,
    sets: Sequence[DataSet],
    settings: Settings,
    world_size: int,
    device_type: str,
    change_layers: ChangeLayers | None = None,
) -> Prepared:
    """Check an evaluation against the model and the number of ranks.

    Args:
        subject: the model.
        sets: the data sets; none for another kind of evaluation, which `change_layers` then decides.
        settings: precision and batch size.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.
        change_layers: see `LoadedModel`; None = those of the run's objective.

    Raises:
        MegatronDSError: the evaluation is impossible; the message names field, value, rule and fix.
    """
    run = subject.run
    for one in sets:
        check_format(one.section, run.model.tokenizer_path)
    hf = read_model_section(run.model)
    check_layout(hf.core.shape(), run.parallel.tensor, run.parallel.pipeline)
    plan = plan_engine(
        _engine_config(subject, hf, settings, world_size, device_type), hf, world_size, device_type, trains_part=True
    )
    for one in sets:
        check_data(one.section, run.parallel, hf.core.shape())
        check_context_length(one.section, run.parallel, plan.context)
    model = open_model(hf, run.model, peft=run.peft, seed=run.train.seed)
    objective = find_objective(run.train.objective, model, sets[0].section, run.train.seed) if sets else None
    change = change_layers or (objective.layers if objective is not None else None)
    return Prepared(model if change is None else replace(model, change_layers=change), plan, objective)


def device_settings(subject: Subject, settings: Settings) -> DeviceSettings:
    """Return the settings of the devices of the ranks."""
    run = subject.run
    stage = summarize_deepspeed(_deepspeed(subject, "fp32")).zero_stage
    return DeviceSettings(run.parallel.tensor, stage, run.train.deterministic, run.train.tf32)


def _engine_config(
    subject: Subject, hf: HFModel, settings: Settings, world_size: int, device_type: str
) -> EngineConfig:
    """Return the config of an engine that holds nothing but weights; micro-batches fill the stages of a pipeline."""
    run = subject.run
    data_size = world_size // run.parallel.model_ranks
    if not data_size or world_size % run.parallel.model_ranks:
        raise TopologyError(
            f"{world_size} ranks are not a multiple of tensor * pipeline * context = {run.parallel.model_ranks}; "
            f"nearest: {max(1, data_size) * run.parallel.model_ranks}"
        )
    precision = _precision(subject, hf, settings, device_type)
    return EngineConfig(
        parallel=run.parallel,
        deepspeed=_deepspeed(subject, precision),
        optimizer=None,
        trains=False,
        global_batch_size=settings.batch_size * data_size * run.parallel.pipeline,
        micro_batch_size=settings.batch_size,
        seed=run.train.seed,
        kernels=run.train.kernels,
    )


def _precision(subject: Subject, hf: HFModel, settings: Settings, device_type: str) -> str:
    """Return the precision of the weights in memory."""
    if settings.dtype != AUTO:
        precision = PRECISIONS[settings.dtype]
        if precision == "fp16" and device_type == "cpu":
            raise ConfigError("dtype=float16 cannot run on cpu, where DeepSpeed has no fp16; nearest: float32")
        assert precision is not None
        return precision
    if subject.is_run:
        return summarize_deepspeed(load_deepspeed(subject.run.deepspeed)).precision
    dtype = str(getattr(hf.config, "dtype", None) or torch.float32).removeprefix("torch.")
    precision = PRECISIONS.get(dtype) or "fp32"
    return "fp32" if precision == "fp16" and device_type == "cpu" else precision  # every fp16 number is one of fp32


def _deepspeed(subject: Subject, precision: str) -> dict[str, Any]:
    """Return a DeepSpeed config without training state.

    ZeRO-3 of a run stays, with the offload of its parameters: the model may not fit a rank without it.
    """
    given = load_deepspeed(subject.run.deepspeed) if subject.is_run else {}
    zero: dict[str, Any] = {"stage": 0}
    if given and summarize_deepspeed(given).zero_stage == 3 and subject.run.parallel.pipeline == 1:
        zero = {key: value for key, value in given["zero_optimization"].items() if key != "offload_optimizer"}
    return {"zero_optimization": zero, **({precision: {"enabled": True}} if precision != "fp32" else {})}
