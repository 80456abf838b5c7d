"""Everything that a plan is made from: a model's layers, the plan of its engine, the rows of its data, and machines.

Nothing in it needs devices, weights, data files or processes. `training.planning` makes one of a run file, the search
changes its engine, and tests and published runs build it from a model's sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from megatron_ds.config import EngineConfig
from megatron_ds.engine.pipeline.partition import partition
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec
from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.trace.setting import TraceSetting
from megatron_ds.runtime.setup import EnginePlan

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machines:
    """The machines of a run, which need not be here.

    Attributes:
        nodes: number of them.
        ranks_per_node: devices of each, one for each rank.
        device_type: torch's name of the devices, `cpu` or `cuda`.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    device_type: Literal["cpu", "cuda"] = "cuda"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Rows:
    """The samples of a run, as far as a plan depends on them.

    Attributes:
        seq_length: S, positions of the inputs.
        target_length: T, positions of a decoder with inputs of its own; None = the model has no such decoder.
        columns: of a batch, by their names in `megatron_ds.columns`.
        labelled: share of the positions that carry loss.
    """

    seq_length: int
    target_length: int | None = None
    columns: tuple[str, ...] = ("input_ids", "targets")
    labelled: float = 1.0

    @property
    def positions(self) -> int:
        """Positions of a sample, which a run counts as its tokens."""
        return self.seq_length + (self.target_length or 0)


@dataclass(frozen=True)
class PlanInput:
    """A run on machines, before it is planned.

    Attributes:
        layers: build context -> the layers to train, with the objective's head and with adapters.
        core: the model in the terms of its math.
        engine: the checked plan of its engine: config, layout, context ranks, filled DeepSpeed config.
        rows: of a batch.
        machines: that it runs on.
        frozen: native names of parameters that are not trained.
        groups: native name -> index of its entry in `optimizer.groups`; see `grouped_parameters`.
        saves_asynchronously: checkpoints are copied to host memory and written in the background.
        save_every: steps between checkpoints; 0 = none.
    """

    layers: Callable[[BuildContext], list[LayerSpec]]
    core: ModelConfig
    engine: EnginePlan
    rows: Rows
    machines: Machines
    frozen: frozenset[str] = frozenset()
    groups: Mapping[str, int] = field(default_factory=dict)
    saves_asynchronously: bool = True
    save_every: int = 0

    @property
    def config(self) -> EngineConfig:
        """The engine's part of the run file."""
        return self.engine.config

    @property
    def layout(self) -> Layout:
        """Sizes of the parallel axes."""
        return self.engine.layout

    @property
    def expert_ranks(self) -> int:
        """Ranks that divide the experts of a layer; 1 without experts."""
        if not self.core.shape().num_experts:
            return 1
        return self.config.parallel.expert or self.layout.tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.engine.summary.precision]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on each data rank."""
        return self.config.global_batch_size // (self.config.micro_batch_size * self.layout.data)

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step on all ranks."""
        return self.config.global_batch_size * self.rows.positions

    @property
    def _has_neighbours(self) -> bool:
        """Tensor ranks of CPUs are on one machine, and exchange parts of sequences through its memory."""
        tensor, machines = self.layout.tensor, self.machines
        shares = machines.device_type == "cpu" and machines.ranks_per_node % tensor == 0
        return shares and tensor > 1 and self.config.parallel.sequence

    def trace_setting(self) -> TraceSetting:
        """The setting in which one rank's layers are traced for a micro-batch: the first rank of each axis."""
        config = self.config
        return TraceSetting(
            self.rows.seq_length,
            micro_batch_size=config.micro_batch_size,
            target_length=self.rows.target_length,
            columns=self.rows.columns,
            labelled=self.rows.labelled,
            precision=self.engine.summary.precision,
            device_type=self.machines.device_type,
            kernels=config.kernels,
            tensor=self.layout.tensor,
            sequence=config.parallel.sequence,
            context=self.engine.context,
            expert=config.parallel.expert,
            neighbours=self._has_neighbours,
            recompute=config.recompute,
            offload_activations=config.offload_activations,
            keep_attention=config.keep_attention,
            mlp_tile_tokens=config.mlp_tile_tokens,
            compile=config.compile,
            zero_stage=self.engine.summary.zero_stage,
            trains=config.trains,
            frozen=self.frozen,
        )

    @cached_property
    def stage_bounds(self) -> list[int]:
        """Index of the first layer of each pipeline stage, and the number of layers."""
        return partition(self.layers(BuildContext()), self.layout.pipeline)

    def with_engine(self, engine: EnginePlan) -> PlanInput:
        """Return the same run with another engine."""
        return replace(self, engine=engine)
