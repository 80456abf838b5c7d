"""Checks of expert parallelism against a model, its ranks and the DeepSpeed JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ds.config.checks import ModelShape, nearest
from megatron_ds.config.engine_config import EngineConfig
from megatron_ds.config.run_config import ParallelSection
from megatron_ds.errors import ConfigError, TopologyError


def check_experts(config: EngineConfig, shape: ModelShape, mapping: Mapping[str, Any], data_size: int) -> None:
    """Check that the experts of a model can be divided over its ranks, and that DeepSpeed can reduce them.

    Args:
        config: the engine's settings.
        shape: the model's sizes.
        mapping: the DeepSpeed JSON, unfilled.
        data_size: data-parallel ranks.

    Raises:
        TopologyError: the experts cannot be divided.
        ConfigError: a setting needs experts, or a bias of their choice, and the model has none; or a key of the JSON
            reduces them wrongly.
    """
    parallel = config.parallel
    if not shape.num_experts:
        _refuse_settings(config)
        return
    if config.moe_bias_rate and not shape.has_choice_bias:
        raise ConfigError(
            f"train.moe_bias_rate={config.moe_bias_rate:g} moves biases of the choice of experts, and this model's "
            "routers have none; remove it, or try train.moe_aux_loss"
        )
    check_expert_layout(parallel, shape, data_size)
    if parallel.expert not in (None, parallel.tensor):
        _check_reduction(parallel, mapping)


@dataclass(frozen=True)
class ExpertNames:
    """The names that the user has for the degrees of parallelism."""

    expert: str = "parallel.expert"
    tensor: str = "parallel.tensor"
    context: str = "parallel.context"


def check_expert_layout(
    parallel: ParallelSection, shape: ModelShape, data_size: int, names: ExpertNames = ExpertNames()
) -> None:
    """Check that the experts of a model, which has some, can be divided over a number of ranks.

    Args:
        parallel: degrees of model parallelism.
        shape: the model's sizes.
        data_size: data-parallel ranks.
        names: the user's names.

    Raises:
        TopologyError: the experts cannot be divided.
    """
    size, num_experts = parallel.expert or parallel.tensor, shape.num_experts
    ranks = parallel.tensor * parallel.context.size * data_size
    if num_experts % size == 0 and ranks % size == 0:
        return
    legal = nearest(size, (n for n in range(1, ranks + 1) if num_experts % n == 0 and ranks % n == 0))
    fix = f"nearest: {names.expert}={' or '.join(map(str, legal))}"
    if num_experts % size:
        given = f"{names.expert}={size}" if parallel.expert else f"{names.tensor}={size}, which divides experts too,"
        raise TopologyError(f"{given} does not divide the model's {num_experts} experts; {fix}")
    of_stage = f"{ranks} rank{'s' if ranks > 1 else ''} of a pipeline stage"
    context = f"{names.context}={parallel.context.size} * " if parallel.context.size > 1 else ""
    raise TopologyError(
        f"{names.expert}={size} does not divide the {of_stage} ({names.tensor}={parallel.tensor} * {context}"
        f"{data_size} data ranks); {fix}"
    )


def _refuse_settings(config: EngineConfig) -> None:
    given = {
        "parallel.expert": config.parallel.expert,
        "train.moe_aux_loss": config.moe_aux_loss,
        "train.moe_z_loss": config.moe_z_loss or None,
        "train.moe_bias_rate": config.moe_bias_rate or None,
    }
    for field, value in given.items():
        if value is not None and (field, value) != ("parallel.expert", 1):
            raise ConfigError(f"{field}={value:g} is for mixtures of experts, and this model has none; remove it")


def _check_reduction(parallel: ParallelSection, mapping: Mapping[str, Any]) -> None:
    """Refuse keys with which DeepSpeed 0.19.8 sums gradients of different experts, or stops with an assertion."""
    zero = mapping.get("zero_optimization") or {}
    for key in ("contiguous_gradients", "reduce_scatter"):
        if zero.get(key) is False:
            raise ConfigError(
                f"zero_optimization.{key}=false in the DeepSpeed JSON cannot run with parallel.expert="
                f"{parallel.expert} and parallel.tensor={parallel.tensor}: DeepSpeed then reduces gradients of experts "
                f"over the wrong ranks; remove it, or try parallel.expert={parallel.tensor}"
            )
