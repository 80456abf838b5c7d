"""The work of a training step: the layers of each pipeline stage, and communication and updates at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ds.planner.operations import LayerTrace, Work
from megatron_ds.planner.pipeline.schedules import Schedule


@dataclass(frozen=True)
class StageWork:
    """The layers of a virtual pipeline stage, for one micro-batch.

    Attributes:
        layers: their traces; equal layers share one.
        gradients: further work of its backward pass, such as sums of gradients.
        sends: what goes to the next stage, and comes back as a gradient; empty in the last one.
    """

    layers: Sequence[LayerTrace]
    gradients: Work = field(default_factory=Work)
    sends: Work = field(default_factory=Work)


@dataclass(frozen=True)
class EndWork:
    """A rank's communication and updates in a step, apart from its passes.

    Attributes:
        sent: its communication. Hidden parts run while the passes of `hiding` micro-batches compute.
        hiding: see `sent`.
        update: computation of the optimizer.
        host_s: seconds in which its host computes for it.
    """

    sent: Work = field(default_factory=Work)
    hiding: int = 1
    update: Work = field(default_factory=Work)
    host_s: float = 0.0


@dataclass(frozen=True)
class StepWork:
    """A step of one pipeline.

    Attributes:
        stages: virtual stages in the model's order; stage s runs on rank s % p.
        ends: index of a pipeline rank -> its end of the step; of all ranks, or of those that have most to do.
        num_ranks: p.
        num_micro_batches: m.
        tokens: of a step, on all ranks.
        world_size: of all ranks.
        nodes: one of which is the slowest.
        schedule: of the pipeline.
        blocks: ranks wait for messages; False = messages hide behind passes.
        data_s: seconds of a step in which the devices wait for data.
        saved: copies to the host of a checkpoint, for which they wait.
        save_every: steps between two checkpoints.
        dtype: of the peak that MFU refers to.
    """

    stages: Sequence[StageWork]
    ends: Mapping[int, EndWork]
    num_ranks: int
    num_micro_batches: int
    tokens: int
    world_size: int
    nodes: int = 1
    schedule: Schedule = "deepspeed"
    blocks: bool = True
    data_s: float = 0.0
    saved: Work = field(default_factory=Work)
    save_every: int = 1
    dtype: str = "bfloat16"
