"""Lower bounds of a candidate's memory, from the parameters and the activations of its pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from megatron_ds.planner.memory.engine import FP32
from megatron_ds.planner.memory.stage import allowances
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.search.space import Candidate
from megatron_ds.planner.search.stage_shares import StageShare, StageShares


class MemoryFloors:
    """Lower bounds of memory of candidates of a run.

    Args:
        given: the run, at any layout.
        shares: the stages of its model.
    """

    def __init__(self, given: PlanInput, shares: StageShares) -> None:
        self._given, self._shares = given, shares

    def __call__(self, candidate: Candidate, activations: Sequence[float], num_micro_batches: int) -> tuple[int, int]:
        """Return the least memory of the device and the host that need most.

        Args:
            candidate: the layout and settings.
            activations: bytes that each stage holds at once, temporaries of passes included.
            num_micro_batches: of a step.
        """
        count, device, host = num_micro_batches, 0.0, 0.0
        for stage, kept in zip(self._shares.of(candidate.pipeline), activations):
            fixed, gradients, hosted = self._held(candidate, stage)
            lasting = self._keeps_gradients(candidate) or count > stage.in_flight(count)
            device = max(device, fixed + kept + (gradients if lasting else 0), fixed + gradients)
            host = max(host, hosted)
        if self._given.machines.device_type != "cpu":
            device += sum(allowances(self._num_axes(candidate), int(device)).values())
        return int(device), int(host)

    def _num_axes(self, candidate: Candidate) -> int:
        data = self._given.machines.world_size // candidate.model_ranks
        sizes = [data, candidate.tensor, candidate.pipeline, candidate.context]
        if self._has_experts:
            sizes.append(candidate.expert or candidate.tensor)
        return sum(size > 1 for size in sizes)

    @cached_property
    def _has_experts(self) -> bool:
        return self._given.core.shape().num_experts > 0

    def _keeps_gradients(self, candidate: Candidate) -> bool:
        """Return whether gradients have memory also before a step's first backward pass."""
        sums_all = candidate.zero_stage == 1 and self._given.engine.summary.precision == "bf16"
        return candidate.zero_stage == 3 or sums_all

    @property
    def _sums(self) -> int:
        """Bytes of an element of the gradients that stage 1 keeps."""
        return FP32 if self._given.engine.summary.precision == "bf16" else self._given.dtype.itemsize

    def _held(self, candidate: Candidate, stage: StageShare) -> tuple[float, float, float]:
        """Return bytes of weights and optimizer state, of gradients, and those on the host.

        Stage 1 keeps gradients whole, stages 2 and 3 a part of them. The optimizer has fp32 weights, and at least the
        state that it has of every element.
        """
        element, tensor = self._given.dtype.itemsize, candidate.tensor
        expert = candidate.expert or tensor
        ranks = self._given.machines.world_size // tensor // candidate.pipeline
        state = self._state_bytes + (FP32 if element < FP32 or candidate.zero_stage else 0)
        fixed = gradients = host = 0.0
        parts = (
            (stage.dense / tensor, stage.trained_dense / tensor, ranks),
            (stage.experts / expert, stage.trained_experts / expert, max(1.0, ranks * tensor / expert)),
        )
        for number, trained, shards in parts:
            if not candidate.offload_param:
                fixed += number * element / (shards if candidate.zero_stage == 3 else 1)
            moved = trained * state / (shards if candidate.zero_stage else 1)
            if candidate.offload_optimizer:
                host += moved
            else:
                fixed += moved
                gradients += trained * (self._sums if candidate.zero_stage == 1 else element / shards)
        return fixed, gradients, host

    @cached_property
    def _state_bytes(self) -> int:
        """Bytes of the optimizer's state of an element."""
        section = self._given.config.optimizer
        return 8 if section is not None and section.name == "adamw" else 0
