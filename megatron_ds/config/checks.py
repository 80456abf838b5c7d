"""Checks of a run against a model and a number of ranks. They need sizes alone, no process group and no weights.

Each rule names the field, its value, the rule and the nearest values that pass the same rule.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ds.config.deepspeed_json import DeepSpeedSummary
from megatron_ds.config.engine_config import EngineConfig
from megatron_ds.config.run_config import DataSection, ParallelSection, RunConfig
from megatron_ds.errors import ConfigError, TopologyError


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide how it can be divided.

    `ffn_size` is the MLP's inner width, or a common divisor of several; 0 if no layer has one. `max_positions` is the
    length of a learned position table, None if positions are computed (rotary, relative). `num_experts` is the number
    of experts in each layer that has some; `has_choice_bias`: their routers choose by scores with biases. `causal`: a
    stack of its layers is. `score_options`: names of what its attention has, and no kernel that returns a log-sum-exp.
    `length_ropes`: its scalings of rotary frequencies that depend on the length of the sequence.
    """

    num_layers: int
    num_attention_heads: int
    ffn_size: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    num_experts: int = 0
    has_choice_bias: bool = False
    causal: bool = True
    score_options: tuple[str, ...] = ()
    length_ropes: tuple[str, ...] = ()


def check_run(run: RunConfig, shape: ModelShape, summary: DeepSpeedSummary, world_size: int, device_type: str) -> int:
    """Check that a run is possible, and return its data-parallel size.

    Args:
        run: the run.
        shape: its model's sizes.
        summary: the summary of its DeepSpeed JSON.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.

    Raises:
        TopologyError: model, batch or ranks cannot be divided as requested.
        ConfigError: precision, ZeRO stage or offload cannot run with this parallelism or device.
    """
    check_layout(shape, run.parallel.tensor, run.parallel.pipeline)
    check_data(run.data, run.parallel, shape)
    data_size = check_engine(EngineConfig.of_run(run), shape, summary, world_size, device_type)
    check_ramped_batches(run, data_size)
    return data_size


def check_ramped_batches(run: RunConfig, data_size: int) -> None:
    """Check that data ranks can share every batch of `train.batch_ramp`.

    Raises:
        TopologyError: a batch is not divisible by the samples that they process at a time.
    """
    ramp, micro = run.train.batch_ramp, run.train.micro_batch_size
    for name in ("start", "increment") if ramp is not None else ():
        value, at_once = getattr(ramp, name), micro * data_size
        if value % at_once:
            raise TopologyError(
                f"train.batch_ramp.{name}={value} is not divisible by train.micro_batch_size={micro} * {data_size} "
                f"data ranks = {at_once}; nearest: {_alternatives(_nearest_multiples(value, at_once))}"
            )


def check_data(data: DataSection, parallel: ParallelSection, shape: ModelShape) -> None:
    """Check the length of samples against the model's positions and against sequence parallelism.

    Raises:
        ConfigError: samples are longer than the table of learned positions.
        TopologyError: the length cannot be divided over the tensor ranks.
    """
    _check_positions(data, shape)
    _check_sequence(data, parallel, shape)


def check_engine(
    config: EngineConfig, shape: ModelShape, summary: DeepSpeedSummary, world_size: int, device_type: str
) -> int:
    """Check that an engine is possible, and return its data-parallel size; `check_run` checks the data too."""
    parallel = config.parallel
    check_layout(shape, parallel.tensor, parallel.pipeline)
    _check_precision(summary, device_type)
    _check_zero(config, summary)
    data_size = _check_world(parallel, shape, world_size)
    _check_shared_memory(parallel, world_size, device_type)
    _check_batch(config, data_size)
    return data_size


def nearest(value: int, legal: Iterable[int]) -> list[int]:
    """Return the closest legal values below and above `value`, or `value` itself if it is legal."""
    values = sorted(set(legal))
    if value in values:
        return [value]
    below = [one for one in values if one < value]
    above = [one for one in values if one > value]
    return below[-1:] + above[:1]


def _alternatives(values: Iterable[int]) -> str:
    return " or ".join(str(value) for value in values)


def _nearest_multiples(value: int, of: int, at_most: int | None = None) -> list[int]:
    """Return the positive multiples of `of` on both sides of `value`, none above `at_most`."""
    below = value // of * of
    candidates = (below, below + of)
    return [one for one in candidates if one > 0 and (at_most is None or one <= at_most)]


def _legal_tensors(shape: ModelShape) -> list[int]:
    """Return every tensor size that divides attention heads and the MLP."""
    common = math.gcd(shape.num_attention_heads, shape.ffn_size)
    return [degree for degree in range(1, common + 1) if common % degree == 0]


def check_layout(
    shape: ModelShape, tensor: int, pipeline: int, names: tuple[str, str] = ("parallel.tensor", "parallel.pipeline")
) -> None:
    """Check that a model can be divided over a number of tensor and pipeline ranks.

    Key and value heads need not divide: if there are fewer of them than tensor ranks, several ranks hold the same one.

    Args:
        shape: the model's sizes.
        tensor, pipeline: the parallel sizes.
        names: the names that the user has for them.

    Raises:
        TopologyError: the model cannot be divided.
    """
    for name, degree in zip(names, (tensor, pipeline)):
        if degree < 1:
            raise TopologyError(f"{name}={degree} is less than one rank; nearest: 1")
    for field in ("num_attention_heads", "ffn_size"):
        size = getattr(shape, field)
        if size % tensor:
            raise TopologyError(
                f"{names[0]}={tensor} does not divide {field}={size}; "
                f"nearest: {_alternatives(nearest(tensor, _legal_tensors(shape)))}"
            )
    if pipeline > shape.num_layers:
        raise TopologyError(
            f"{names[1]}={pipeline} is more than num_layers={shape.num_layers}, "
            f"and each stage needs a layer; nearest: {shape.num_layers}"
        )


def _check_positions(data: DataSection, shape: ModelShape) -> None:
    if shape.max_positions is not None and data.seq_length > shape.max_positions:
        raise ConfigError(
            f"data.seq_length={data.seq_length} is more than the model's {shape.max_positions} learned positions; "
            f"nearest: {shape.max_positions}"
        )


def check_target_length(parallel: ParallelSection, target_length: int | None) -> None:
    """Check that sequence parallelism can divide the positions of an encoder-decoder's decoder.

    Raises:
        TopologyError: `target_length` is not divisible by the tensor size.
    """
    tensor = parallel.tensor
    if _must_divide(parallel) and target_length is not None and target_length % tensor:
        raise TopologyError(
            f"data.target_length={target_length} is not divisible by parallel.tensor={tensor}, which "
            f"parallel.sequence=true needs; nearest: {-(-target_length // tensor) * tensor}"
        )


def _check_sequence(data: DataSection, parallel: ParallelSection, shape: ModelShape) -> None:
    tensor, seq_length = parallel.tensor, data.seq_length
    if _must_divide(parallel) and seq_length % tensor:
        lengths = _nearest_multiples(seq_length, tensor, at_most=shape.max_positions)
        fix = f"nearest: {_alternatives(lengths)}" if lengths else "try parallel.sequence=false"
        raise TopologyError(
            f"data.seq_length={seq_length} is not divisible by parallel.tensor={tensor}, "
            f"which parallel.sequence=true needs; {fix}"
        )


def _must_divide(parallel: ParallelSection) -> bool:
    """Return whether tensor ranks divide sequences as they are; those that context ranks divide too are padded."""
    return parallel.sequence and parallel.context.size == 1


def _check_precision(summary: DeepSpeedSummary, device_type: str) -> None:
    if summary.precision == "fp16" and device_type == "cpu":
        raise ConfigError(
            "fp16.enabled=true in the DeepSpeed JSON cannot run on cpu, where DeepSpeed has no fp16; nearest: bf16"
        )


def _check_zero(config: EngineConfig, summary: DeepSpeedSummary) -> None:
    stage, pipeline = summary.zero_stage, config.parallel.pipeline
    stated = f"zero_optimization.stage={stage} in the DeepSpeed JSON"
    if pipeline > 1 and summary.offload_param:
        raise ConfigError(
            f"zero_optimization.offload_param in the DeepSpeed JSON cannot run with parallel.pipeline={pipeline}: "
            "it needs stage 3, which DeepSpeed's pipeline engine does not support; "
            "try stage 1 without offload_param, or parallel.pipeline=1"
        )
    if pipeline > 1 and stage >= 2:
        raise ConfigError(
            f"{stated} cannot run with parallel.pipeline={pipeline}: DeepSpeed's pipeline engine keeps full "
            "gradients across micro-batches; try stage 1, or parallel.pipeline=1"
        )
    if summary.offload_param and stage != 3:
        raise ConfigError(f"zero_optimization.offload_param needs stage 3, but {stated}; try stage 3, or remove it")
    if stage == 3 and summary.hpz_partition_size > 1:
        _check_hpz(config.parallel, summary.hpz_partition_size)
    if stage == 0 and config.optimizer is not None:  # without an optimizer the norm is not used
        _check_stage_0(config.parallel, summary, stated)


def _check_hpz(parallel: ParallelSection, size: int) -> None:
    """Refuse second shards of parameters over ranks that hold different ones; DeepSpeed takes consecutive ranks."""
    for name, ranks in (("parallel.tensor", parallel.tensor), ("parallel.expert", parallel.expert or 1)):
        if ranks > 1:
            raise ConfigError(
                f"zero_optimization.zero_hpz_partition_size={size} in the DeepSpeed JSON cannot run with {name}="
                f"{ranks}: DeepSpeed would gather a parameter from consecutive ranks, which hold different parts of "
                "the model; nearest: 1"
            )


def _check_stage_0(parallel: ParallelSection, summary: DeepSpeedSummary, stated: str) -> None:
    for used, place in (
        (parallel.pipeline > 1, f"parallel.pipeline={parallel.pipeline}"),
        (summary.precision != "fp32", f"{summary.precision}.enabled=true"),
    ):
        if used:
            raise ConfigError(
                f"{stated} cannot run with {place}: DeepSpeed's gradient norm, and so its clipping, "
                "is wrong there; nearest: stage 1 (0 is DeepSpeed's default where no stage is given)"
            )
    if summary.offload_optimizer:
        raise ConfigError(f"zero_optimization.offload_optimizer needs stage 1, 2 or 3, but {stated}; nearest: stage 1")


def _check_world(parallel: ParallelSection, shape: ModelShape, world_size: int) -> int:
    tensor, pipeline, context, ranks = parallel.tensor, parallel.pipeline, parallel.context.size, parallel.model_ranks
    if world_size % ranks == 0:
        return world_size // ranks
    degrees = {
        "tensor": (tensor, _legal_tensors(shape)),
        "pipeline": (pipeline, range(1, shape.num_layers + 1)),
        **({"context": (context, range(1, world_size + 1))} if context > 1 else {}),
    }
    choices = []
    for name, (degree, legal) in degrees.items():
        fitting = nearest(degree, (one for one in legal if world_size % (ranks // degree * one) == 0))
        choices += [f"parallel.{name}={_alternatives(fitting)}"] if fitting else []
    with_these = f"; or, with {world_size}, {', or '.join(choices)}" if choices else ""
    product = " * ".join(f"parallel.{name}={degree}" for name, (degree, _) in degrees.items())
    raise TopologyError(
        f"{product} = {ranks} does not divide the number of ranks {world_size}; nearest: "
        f"{_alternatives(_nearest_multiples(world_size, ranks))} ranks{with_these}"
    )


def _check_shared_memory(parallel: ParallelSection, world_size: int, device_type: str) -> None:
    if not parallel.shared_memory or parallel.tensor == 1:
        return
    if device_type != "cpu":
        raise ConfigError(f"parallel.shared_memory=true is for ranks on CPUs, and they are on {device_type}; try false")
    if parallel.sequence:
        raise ConfigError(
            "parallel.shared_memory=true is for all-reduces, and parallel.sequence=true gathers and scatters instead; "
            "set one of them to false"
        )
    others = {"pipeline": parallel.pipeline, "context": parallel.context.size}
    if parallel.tensor != world_size:
        raise ConfigError(
            f"parallel.shared_memory=true needs all {world_size} ranks to be one tensor group, and "
            f"parallel.tensor={parallel.tensor}; try false, or {parallel.tensor} ranks"
            f"{''.join(f' and parallel.{name}=1' for name, size in others.items() if size > 1)}"
        )


def _check_batch(config: EngineConfig, data_size: int) -> None:
    batch, micro = config.global_batch_size, config.micro_batch_size
    if batch % (micro * data_size):
        raise TopologyError(
            f"train.global_batch_size={batch} is not divisible by train.micro_batch_size={micro} * {data_size} data "
            f"ranks = {micro * data_size}; nearest: {_alternatives(_nearest_multiples(batch, micro * data_size))}"
        )
