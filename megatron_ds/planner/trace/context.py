"""The build context of a traced rank: axes that record, and kernels that stand for those of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch

from megatron_ds.layers.host_offload import HostOffload
from megatron_ds.layers.kernels.select import select_kernels
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.onednn import faster_here
from megatron_ds.layers.recompute import BLOCKS, BLOCKS_WITHOUT_ATTENTION, Recompute
from megatron_ds.models.context import BuildContext
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.neighbours import Neighbours
from megatron_ds.parallel.random import RngStates, RngStreams
from megatron_ds.parallel.tensor import TensorParallel
from megatron_ds.planner.trace.compiled_graphs import Backend, recording_backend
from megatron_ds.planner.trace.groups import (
    RecordingGroup,
    RecordingNeighbours,
    known_to_torch,
    summing_outside_of_graphs,
)
from megatron_ds.planner.trace.host_copies import RecordedCopies
from megatron_ds.planner.trace.kernels import stand_ins
from megatron_ds.planner.trace.recorder import Recorder
from megatron_ds.planner.trace.setting import TraceSetting


class _NoStreams(RngStreams):
    """Random streams that draw nothing and leave torch's generators as they are."""

    def __init__(self) -> None:
        self._nothing = torch.empty(0, dtype=torch.uint8)

    def begin_step(self, step: int) -> None:
        """Do nothing."""

    @contextmanager
    def sharded(self) -> Iterator[None]:
        yield

    def states(self) -> RngStates:
        return self._nothing, self._nothing

    @contextmanager
    def returned_to(self, states: RngStates) -> Iterator[None]:
        yield

    def replayable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn


@contextmanager
def recording_context(setting: TraceSetting, recorder: Recorder) -> Iterator[BuildContext]:
    """Yield the build context of a rank whose communication a recorder gets."""
    axes: list[Axis] = []

    def axis(name: str, size: int, rank: int = 0) -> Axis:
        if size == 1:
            return Axis()
        group = RecordingGroup(name, rank, size, recorder)
        axes.append(Axis(size, rank, tuple(range(size)), group))
        if setting.compile:
            axes[-1] = replace(axes[-1], sum_here=summing_outside_of_graphs(group))
        return axes[-1]

    tensor = axis("tensor", setting.tensor, setting.tensor_rank)
    if setting.neighbours and setting.tensor > 1:
        neighbours = RecordingNeighbours(setting.tensor, recorder)
        tensor = Axis(*_place(tensor), tensor.group, neighbours.sum_, cast(Neighbours, neighbours))
    plan, at = setting.context, divmod(setting.context_rank, setting.context.ulysses)
    whole = axis("context", plan.size, setting.context_rank)
    ulysses = Axis() if plan.ulysses == 1 else whole if plan.ring == 1 else axis("ulysses", plan.ulysses, at[1])
    ring = Axis() if plan.ring == 1 else whole if plan.ulysses == 1 else axis("ring", plan.ring, at[0])
    eager_products = setting.device_type == "cpu" and setting.precision == "fp32" and faster_here()
    tp = TensorParallel(
        tensor, setting.sequence, eager_products, ContextParallel(whole, ulysses, ring, plan.method, plan.zigzag)
    )
    expert = tensor if setting.expert in (None, setting.tensor) else axis("expert", setting.expert or 1)
    kernels = stand_ins(setting.kernels, recorder, setting.documents)
    compiling: AbstractContextManager[Backend | None]
    compiling = recording_backend(recorder) if setting.compile else nullcontext()
    with known_to_torch(axes), compiling as backend:
        yield BuildContext(
            tp=tp,
            rng=_NoStreams(),
            recompute=_recompute(setting, recorder),
            kernels=kernels if setting.device_type != "cpu" else select_kernels(setting.kernels, torch.device("cpu")),
            experts=ExpertParallel(expert, tp),
            routers=RouterSettings(setting.router_aux_loss, setting.router_z_loss),
            mlp_tile_tokens=setting.mlp_tile_tokens,
            compiled=setting.compile,
            compiler=backend or "inductor",
        )


def _place(axis: Axis) -> tuple[int, int, tuple[int, ...]]:
    return axis.size, axis.rank, axis.ranks


def _recompute(setting: TraceSetting, recorder: Recorder) -> Recompute:
    if setting.recompute == "none":
        return Recompute()
    offload = HostOffload(RecordedCopies(recorder)) if setting.offload_activations else None
    checkpoint = BLOCKS_WITHOUT_ATTENTION if setting.keep_attention else BLOCKS
    return Recompute(setting.recompute, checkpoint, offload=offload)
