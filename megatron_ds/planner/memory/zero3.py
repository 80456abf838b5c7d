"""Memory of DeepSpeed's optimizer for ZeRO-3: every parameter divided, gathered when its module needs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.memory.engine import (
    BUCKETS,
    FP32,
    GATHERED,
    GRADIENTS,
    MASTERS,
    WEIGHTS,
    EngineMemory,
    EngineSetting,
)
from megatron_ds.planner.memory.ledger import Ledger
from megatron_ds.planner.moments import ModulePass
from megatron_ds.planner.weight_schedule import Change, WeightChange, WeightSchedule, divided_numel, persistent


@dataclass
class _Memory:
    """Memory of weights.

    Attributes:
        num_bytes: of it.
        holders: names of the weights that keep it.
    """

    num_bytes: int
    holders: set[str]


@dataclass
class _Flight(_Memory):
    """Memory that a gather receives weights in.

    Attributes:
        copied: weights that get a copy of their part.
    """

    copied: list[HeldParameter] = field(default_factory=list)


class DividedEngine(EngineMemory):
    """ZeRO-3: a rank holds a part of each parameter, of its gradient and of its state.

    `WeightSchedule` says which weights are gathered, arrive and are released.

    Args:
        held, setting, device, host: see `EngineMemory`.
        passes: of modules in a micro-batch; see `module_passes`.
    """

    def __init__(
        self, held: HeldStage, setting: EngineSetting, device: Ledger, host: Ledger, passes: Sequence[ModulePass]
    ) -> None:
        super().__init__(held, setting, device, host)
        self._persistent = persistent(held.parameters, setting.zero)
        count = setting.num_micro_batches
        self._schedule = WeightSchedule(setting.zero, held.parameters, held.used, passes, count)
        self._whole: dict[str, _Memory] = {}  # complete weights
        self._flights: dict[str, _Flight] = {}  # gathers that nobody has waited for
        self._filled: list[HeldParameter] = []

    def part_of(self, parameter: HeldParameter) -> int:
        """Return the elements of a parameter that the rank holds."""
        return -(-parameter.numel // self.ranks_of([parameter]))

    def build(self) -> None:
        """Hold a part of weights, gradients and state, the bucket, and small parameters whole."""
        setting = self.setting
        state = self.host if setting.zero.offloads_optimizer else self.device
        weights = self.host if setting.zero.offloads_weights else self.device
        small = {one.name for one in self._persistent}
        for one in self.held.parameters:
            is_flat = one.trains  # lp_param_buffer
            place = weights if is_flat or one.name not in small else self.device
            place.add(WEIGHTS, self.part_of(one) * self.item)
            if setting.zero.hpz > 1:  # ZeRO++
                self.device.add(WEIGHTS, -(-one.numel // setting.zero.hpz) * self.item)
        for index, group in enumerate(self.groups):
            numel = sum(self.part_of(one) for one in group)
            state.add(MASTERS, numel * FP32)  # fp32_partitioned_groups_flat
            state.add(GRADIENTS, numel * self._gradient_item)  # grad_partitions_flat_buffer
            for part, num_bytes in self.states(numel, index).items():
                state.add(part, num_bytes)
            if setting.zero.offloads_optimizer:
                state.add(GRADIENTS, numel * FP32)  # the masters' .grad
        if setting.zero.contiguous_gradients:
            self.device.add(BUCKETS, setting.zero.reduce_bucket_size * self.item)
        self._receive(self._persistent)

    @property
    def _gradient_item(self) -> int:
        return self.zero.accumulated_bytes

    # ---- weights -------------------------------------------------------------------------------------------------

    def follow(self, one: ModulePass) -> None:
        """Gather weights ahead of a module, or release some after it."""
        self._apply(self._schedule.follow(one))

    def _apply(self, changes: Iterable[WeightChange]) -> None:
        for one in changes:
            if one.change == Change.GATHER:
                self._gather(one)
                continue
            for weight in one.weights:
                if weight.name in self._flights:
                    self._arrive(weight)
                if one.change == Change.RELEASE:
                    self._release_shared(self._whole.pop(weight.name), weight)

    def _gather(self, gather: WeightChange) -> None:
        """Begin a gather (all_gather_coalesced): several weights arrive in one vector, a single one in its own."""
        zero, flight = self.zero, _Flight(0, {one.name for one in gather.weights})
        for apart in (False, True):
            weights = [one for one in gather.weights if one.apart == apart]
            padded_bytes = sum(divided_numel(one, self.ranks_of([one])) for one in weights) * self.item
            coalesced = len(weights) > 1 and not zero.allgather_sequential
            if not coalesced or self.ranks_of(weights) == 1:
                self._receive(weights)
            elif zero.use_all_reduce_for_fetch_params and not gather.second:  # the weights are views of it
                self._share(_Memory(padded_bytes, {one.name for one in weights}))
            else:
                flight.num_bytes += padded_bytes
                flight.copied += weights
        self.device.add(GATHERED, flight.num_bytes)
        self._flights.update(dict.fromkeys(flight.holders, flight))

    def _arrive(self, weight: HeldParameter) -> None:
        """Wait for a weight (AllGatherCoalescedHandle.wait), upon which all of its gather are copied.

        What the gather received stays until all of its weights have been waited for.
        """
        flight = self._flights.pop(weight.name)
        for one in flight.copied:
            self._share(_Memory(one.numel * self.item, {one.name}))
        flight.copied = []
        self._release_shared(flight, weight)

    def _receive(self, weights: Iterable[HeldParameter]) -> None:
        """Hold complete weights, each in the memory that it is gathered into."""
        for one in weights:
            ranks = self.ranks_of([one])
            is_view = ranks == 1 and not (self.zero.offloads_weights and self.device is not self.host)
            self._share(_Memory(0 if is_view else divided_numel(one, ranks) * self.item, {one.name}))

    def _share(self, memory: _Memory) -> None:
        self.device.add(GATHERED, memory.num_bytes)
        self._whole.update(dict.fromkeys(memory.holders, memory))

    def _release_shared(self, memory: _Memory, weight: HeldParameter) -> None:
        memory.holders.discard(weight.name)
        if not memory.holders:
            self.device.release(GATHERED, memory.num_bytes)

    # ---- gradients -----------------------------------------------------------------------------------------------

    def gradient(self, parameter: HeldParameter) -> None:
        """Let it pass through the bucket."""
        num_bytes, filled = parameter.numel * self.item, sum(one.numel for one in self._filled)
        self.device.add(GRADIENTS, num_bytes)
        if self._filled and filled + parameter.numel > self.zero.reduce_bucket_size:
            self._reduce()
            filled = 0
        if self.zero.contiguous_gradients and filled + parameter.numel <= self.zero.reduce_bucket_size:
            self.device.release(GRADIENTS, num_bytes)  # the bucket has its copy
        self._filled.append(parameter)

    def _reduce(self) -> None:
        """Reduce what is in the bucket (__avg_scatter_grads), and add the rank's part to its gradients."""
        for of_experts in (False, True):
            chosen = [one for one in self._filled if one.apart == of_experts]
            if not chosen:
                continue
            ranks = self.ranks_of(chosen)
            padded = sum(self.part_of(one) for one in chosen) * ranks * self.item
            flat = padded if len(chosen) > 1 or chosen[0].numel % ranks else 0
            cast = 0
            if self._gradient_item != self.item:
                cast = sum(self.part_of(one) for one in chosen) * self._gradient_item
            received = (
                (ranks - 1) * padded // ranks if self.device is self.host else 0
            )  # `messages.begin_reduce_scatter`
            with self.device.holding(BUCKETS, flat + received):
                pass
            with self.device.holding(BUCKETS, flat + cast):
                pass
        too_large = [
            one
            for one in self._filled
            if one.numel > self.zero.reduce_bucket_size or not self.zero.contiguous_gradients
        ]
        self.device.release(GRADIENTS, sum(one.numel for one in too_large) * self.item)
        self._filled.clear()

    def end_backward(self, *, is_last: bool) -> None:
        """Reduce what is left in the bucket."""
        self._reduce()
        self._apply(self._schedule.end())

    def step(self) -> None:
        """Release gathered weights, update the rank's parts, and gather small parameters again."""
        self.device.release(GATHERED)
        self._whole.clear()
        for group in self.groups:
            for parameters in self._sub_groups(group):
                numel = sum(self.part_of(one) for one in parameters)
                flat = 0 if self.zero.offloads_optimizer else numel * self._gradient_item
                cast = numel * FP32 if flat and self._gradient_item != FP32 else 0
                with self.device.holding(GRADIENTS, flat + cast):
                    pass
                with self.device.holding(GRADIENTS, cast or flat):
                    self.update(parameters, [numel])
        self._receive(self._persistent)

    def _sub_groups(self, group: Sequence[HeldParameter]) -> list[list[HeldParameter]]:
        found: list[list[HeldParameter]] = [[]]
        total = 0
        for one in group:
            found[-1].append(one)
            total += self.part_of(one)
            if total >= self.zero.sub_group_size:
                found.append([])
                total = 0
        return [one for one in found if one]
