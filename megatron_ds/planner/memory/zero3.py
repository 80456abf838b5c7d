"""Memory of DeepSpeed's optimizer for ZeRO-3: every parameter divided, gathered when its module needs it."""

from __future__ import annotations

from collections.abc import Sequence

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


class DividedEngine(EngineMemory):
    """ZeRO-3: a rank holds a part of each parameter, of its gradient and of its state.

    Gathered weights stay until the use of so many others lies before their next use that DeepSpeed releases them
    (`stage3_max_reuse_distance`), those of small parameters always.
    """

    def __init__(self, held: HeldStage, setting: EngineSetting, device: Ledger, host: Ledger) -> None:
        super().__init__(held, setting, device, host)
        self._persistent = [one for one in held.parameters if one.numel <= setting.persistent]
        self._gathered: dict[str, int] = {}
        self._filled: list[HeldParameter] = []
        self._uses: Sequence[Sequence[HeldParameter]] = []
        self._position = 0

    def part_of(self, parameter: HeldParameter) -> int:
        """Return the elements of a parameter that the rank holds."""
        return -(-parameter.numel // self.ranks_of([parameter]))

    def build(self) -> None:
        """Hold a part of weights, gradients and state, the bucket, and small parameters whole."""
        setting = self.setting
        state = self.host if setting.offload_optimizer else self.device
        weights = self.host if setting.offload_param else self.device
        persistent = {one.name for one in self._persistent}
        for one in self.held.parameters:
            is_flat = one.trains  # lp_param_buffer
            place = weights if is_flat or one.name not in persistent else self.device
            place.add(WEIGHTS, self.part_of(one) * self.item)
            if setting.second_shards > 1:  # ZeRO++
                self.device.add(WEIGHTS, -(-one.numel // setting.second_shards) * self.item)
        for index, group in enumerate(self.groups):
            numel = sum(self.part_of(one) for one in group)
            state.add(MASTERS, numel * FP32)  # fp32_partitioned_groups_flat
            state.add(GRADIENTS, numel * self._gradient_item)  # grad_partitions_flat_buffer
            for part, num_bytes in self.states(numel, index).items():
                state.add(part, num_bytes)
            if setting.offload_optimizer:
                state.add(GRADIENTS, numel * FP32)  # the masters' .grad
        if setting.contiguous:
            self.device.add(BUCKETS, setting.bucket * self.item)
        self._gather(self._persistent)

    @property
    def _gradient_item(self) -> int:
        return FP32 if self.setting.precision == "bf16" else self.item

    # ---- weights -------------------------------------------------------------------------------------------------

    def follow(self, uses: Sequence[Sequence[HeldParameter]]) -> None:
        """Know the parameters of each module of a micro-batch, in the order of their use, forward and backward."""
        self._uses, self._position = uses, 0

    def _gather(self, parameters: Sequence[HeldParameter]) -> None:
        for one in parameters:
            if one.name not in self._gathered:
                is_whole = self.ranks_of([one]) == 1  # then its part is what the layers use
                self._gathered[one.name] = 0 if is_whole else one.numel * self.item
                self.device.add(GATHERED, self._gathered[one.name])

    def enter(self, parameters: Sequence[HeldParameter]) -> None:
        """Gather the weights that are missing, and those of the modules to come."""
        missing = [one for one in parameters if one.name not in self._gathered]
        flat = sum(self.part_of(one) * self.ranks_of([one]) for one in missing) * self.item
        if any(self.ranks_of([one]) > 1 for one in missing):
            with self.device.holding(GATHERED, flat):  # the gathered vector, until each parameter has its copy
                self._gather(missing)
        else:
            self._gather(missing)
        self._position += 1
        gathered = sum(one.numel for one in self.held.parameters if one.name in self._gathered)
        ahead, room = 0, min(self.setting.gather_bucket, self.setting.most_gathered - gathered)
        for later in self._uses[self._position :]:  # prefetch
            for one in later:
                if ahead < room and one.name not in self._gathered:
                    self._gather([one])
                    ahead += one.numel

    def leave(self, parameters: Sequence[HeldParameter]) -> None:
        """Release the weights that are not needed soon."""
        traversed, reused = 0, set[str]()
        for later in self._uses[self._position :]:
            if traversed >= self.setting.reuse_distance:
                break
            reused.update(one.name for one in later)
            traversed += sum(one.numel for one in later)
        for one in parameters:
            if one.numel > self.setting.persistent and one.name not in reused and one.name in self._gathered:
                self.device.release(GATHERED, self._gathered.pop(one.name))

    # ---- gradients -----------------------------------------------------------------------------------------------

    def gradient(self, parameter: HeldParameter) -> None:
        """Let it pass through the bucket."""
        num_bytes, filled = parameter.numel * self.item, sum(one.numel for one in self._filled)
        self.device.add(GRADIENTS, num_bytes)
        if self._filled and filled + parameter.numel > self.setting.bucket:
            self._reduce()
            filled = 0
        if self.setting.contiguous and filled + parameter.numel <= self.setting.bucket:
            self.device.release(GRADIENTS, num_bytes)  # the bucket has its copy
        self._filled.append(parameter)

    def _reduce(self) -> None:
        """Reduce what is in the bucket (__avg_scatter_grads), and add the rank's part to its gradients."""
        for of_experts in (False, True):
            chosen = [one for one in self._filled if one.apart == of_experts]
            if not chosen:
                continue
            ranks = self.ranks_of(chosen)
            flat = sum(self.part_of(one) for one in chosen) * ranks * self.item
            flat = flat if len(chosen) > 1 or chosen[0].numel % ranks else 0
            cast = 0
            if self._gradient_item != self.item:
                cast = sum(self.part_of(one) for one in chosen) * self._gradient_item
            received = (ranks - 1) * flat // ranks if self.device is self.host else 0  # `messages.begin_reduce_scatter`
            with self.device.holding(BUCKETS, flat + received):
                pass
            with self.device.holding(BUCKETS, flat + cast):
                pass
        too_large = [one for one in self._filled if one.numel > self.setting.bucket or not self.setting.contiguous]
        self.device.release(GRADIENTS, sum(one.numel for one in too_large) * self.item)
        self._filled.clear()

    def end_backward(self, *, is_last: bool) -> None:
        """Reduce what is left in the bucket."""
        self._reduce()

    def step(self) -> None:
        """Release gathered weights, update the rank's parts, and gather small parameters again."""
        for name in list(self._gathered):
            self.device.release(GATHERED, self._gathered.pop(name))
        if not self.setting.offload_optimizer:
            for group in self.groups:
                for numel in self._sub_groups(group):
                    cast = numel * FP32 if self._gradient_item != FP32 else 0
                    with self.device.holding(GRADIENTS, numel * self._gradient_item + cast):
                        pass
        self._gather(self._persistent)

    def _sub_groups(self, group: Sequence[HeldParameter]) -> list[int]:
        sizes = [0]
        for one in group:
            sizes[-1] += self.part_of(one)
            if sizes[-1] >= self.setting.sub_group:
                sizes.append(0)
        return [size for size in sizes if size]
