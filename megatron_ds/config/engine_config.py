"""The part of a run that decides its engine: parallelism, DeepSpeed, optimizer, batch sizes.

`EngineConfig.of_run` extracts it from a run file; a Python program builds one by keyword. It holds nothing about
data, files or the number of steps, so an engine can be built without them.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_ds.config.run_config import (
    EmaSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    ScheduleSection,
    kernel_choice,
    path_or_mapping,
)
from megatron_ds.config.schema_base import Count, NonNegative, PathOrMapping, Section, integral_float_to_int


class EngineConfig(Section):
    """Everything besides the model that an engine is built from. The fields are those of the run file's sections.

    Attributes:
        parallel: sizes of the parallel axes.
        deepspeed: path of a DeepSpeed JSON, or its content; "auto" values are filled from the other fields.
        optimizer: None = gradients are computed and kept, and weights never change.
        trains: False = the engine only evaluates, and holds weights alone.
        schedule: settings that a `scheduler` block of the DeepSpeed JSON must agree with; None = no block is allowed.
        steps: the number of steps in such a block; None = it is not known yet, and none is allowed.
        global_batch_size, micro_batch_size: samples per optimizer step, and per forward pass on one rank.
        seed: of dropout and of random initialisation.
        recompute, offload_activations, keep_attention, mlp_tile_tokens: as under `train` in the run file.
        compile, kernels, moe_aux_loss, moe_z_loss, moe_bias_rate, ema: as under `train` in the run file.
    """

    parallel: ParallelSection = ParallelSection()
    deepspeed: Annotated[PathOrMapping, BeforeValidator(path_or_mapping)] = {}
    optimizer: OptimizerSection | None = OptimizerSection()
    trains: bool = True
    schedule: ScheduleSection | None = None
    steps: Count | None = None
    global_batch_size: Count = 8
    micro_batch_size: Count = 1
    seed: Annotated[int, BeforeValidator(integral_float_to_int), Field(ge=0, lt=2**32)] = 1234
    recompute: Literal["none", "selective", "full"] = "none"
    offload_activations: bool = False
    keep_attention: bool = False
    mlp_tile_tokens: Count | None = None
    compile: bool = False
    kernels: Annotated[str | dict[str, Any], BeforeValidator(kernel_choice)] = "auto"
    moe_aux_loss: NonNegative | None = None
    moe_z_loss: NonNegative = 0.0
    moe_bias_rate: NonNegative = 0.0
    ema: EmaSection | None = None

    @classmethod
    def of_run(cls, run: RunConfig) -> "EngineConfig":
        """Extract the engine's part of a run file."""
        train = run.train
        return cls(
            parallel=run.parallel,
            deepspeed=run.deepspeed,
            optimizer=run.optimizer,
            schedule=run.schedule,
            steps=train.steps,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            seed=train.seed,
            recompute=train.recompute,
            offload_activations=train.offload_activations,
            keep_attention=train.keep_attention,
            mlp_tile_tokens=train.mlp_tile_tokens,
            compile=train.compile,
            kernels=train.kernels,
            moe_aux_loss=train.moe_aux_loss,
            moe_z_loss=train.moe_z_loss,
            moe_bias_rate=train.moe_bias_rate,
            ema=train.ema,
        )

    @property
    def grad_clip(self) -> float:
        """Bound of the gradient norm; 0 = none."""
        return self.optimizer.grad_clip if self.optimizer is not None else 0.0
