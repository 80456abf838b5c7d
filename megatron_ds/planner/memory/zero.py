"""Memory of DeepSpeed's optimizer for ZeRO-1 and 2 (`DeepSpeedZeroOptimizer`), with or without offload."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.memory.engine import (
    BUCKETS,
    FP32,
    GRADIENTS,
    MASTERS,
    WEIGHTS,
    EngineMemory,
    EngineSetting,
    own_elements,
    padded_numel,
)
from megatron_ds.planner.memory.ledger import Ledger


class FlatEngine(EngineMemory):
    """ZeRO-1 and 2: each group's weights are one flat vector, cut into a partition for each rank.

    At stage 1 gradients stay in the parameters until the last micro-batch's are there, and then pass through the bucket
    one after the other; at stage 2 each passes through it as soon as it is there. The rank keeps those of parameters
    that reach into its partition.

    Args:
        held, setting, device, host: see `EngineMemory`.
        rank: index of the rank among those that share the states.
    """

    def __init__(self, held: HeldStage, setting: EngineSetting, device: Ledger, host: Ledger, rank: int = 0) -> None:
        super().__init__(held, setting, device, host)
        self._divides_gradients = setting.zero.stage == 2
        self._sums_fp32 = setting.zero.accumulated_bytes > self.item  # of the partition alone at stage 2
        self._own: dict[str, int] = {}  # parameters that the rank's partition has a part of -> elements of it
        self._shared: set[str] = set()  # parameters that several partitions have a part of
        self._parts: list[int] = []  # elements of the partition of each group
        self._group_of: dict[str, int] = {}
        for index, group in enumerate(self.groups):
            self._own |= own_elements(group, self.ranks_of(group), rank)
            self._parts.append(padded_numel(group, 2 * self.ranks_of(group)) // self.ranks_of(group))
            self._group_of |= {one.name: index for one in group}
            self._find_shared(group, self._parts[-1])

    def _find_shared(self, group: Sequence[HeldParameter], size: int) -> None:
        begin = 0
        for one in group:
            if begin // size != (begin + one.numel - 1) // size:
                self._shared.add(one.name)
            begin += one.numel

    def keeps(self, parameter: HeldParameter) -> bool:
        """Return whether the rank's partition has a part of a parameter."""
        return parameter.name in self._own

    # ---- between steps -------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Hold flat weights and the rank's partition of the state."""
        setting, state = self.setting, self.host if self.zero.offloads_optimizer else self.device
        self.hold_frozen()
        for index, group in enumerate(self.groups):
            own = self._parts[index]
            self.device.add(WEIGHTS, own * self.ranks_of(group) * self.item)  # bit16_groups_flat
            state.add(MASTERS, own * FP32)  # single_partition_of_fp32_groups
            for part, num_bytes in self.states(own, index).items():
                state.add(part, num_bytes)
            if setting.zero.offloads_optimizer:
                self.host.add(GRADIENTS, own * FP32)  # their .grad
                self.host.add(BUCKETS, own * self.item)  # param_buffer_of_bit16_for_cpu_offload_groups
        if setting.zero.offloads_optimizer:
            largest = max(one.numel for one in self.trained) * self.item
            self.host.add(BUCKETS, largest)  # temp_grad_buffer_for_cpu_offload
            self.device.add(BUCKETS, largest)  # temp_grad_buffer_for_gpu_offload
            if self._divides_gradients and setting.num_micro_batches > 1 and not self._sums_fp32:
                own = sum(one.numel for one in self.trained if one.name in self._own)
                self.host.add(GRADIENTS, own * self.item)  # accumulated_grads_in_cpu
        self._in_parameters: dict[str, int] = {}  # gradients with memory of their own -> bytes
        self._filled: list[HeldParameter] = []  # the bucket
        self._has_bucket = False
        self._kept_bytes = 0  # gradients of the partition, of the micro-batches so far
        self._sums: dict[int, int] = {}  # fp32 sums of the partition of each group that has any -> bytes
        self._own_bytes = 0  # grads_in_partition, of this reduction

    # ---- gradients -----------------------------------------------------------------------------------------------

    @property
    def _sums_in_attribute(self) -> bool:
        """Gradients are summed in fp32 in `grad_accum` (stage 1 in bf16, which only offload brings here)."""
        return self._sums_fp32 and not self._divides_gradients

    def gradient(self, parameter: HeldParameter) -> None:
        """Keep it in the parameter, or let it pass through the bucket at stage 2."""
        num_bytes = parameter.numel * self.item
        self.device.add(GRADIENTS, num_bytes)
        if self.zero.contiguous_gradients and not self._has_bucket:  # setup_buckets
            self._add_buckets()
        if self._sums_in_attribute:
            wide = parameter.numel * FP32
            if parameter.name in self._in_parameters:
                with self.device.holding(GRADIENTS, wide):
                    pass
            else:
                self.device.add(GRADIENTS, wide)
                self._in_parameters[parameter.name] = wide
            self.device.release(GRADIENTS, num_bytes)
        elif parameter.name in self._in_parameters:
            self.device.release(GRADIENTS, num_bytes)
        else:
            self._in_parameters[parameter.name] = num_bytes
        if self._divides_gradients:
            self._pass(parameter)

    def _add_buckets(self) -> None:
        wide = FP32 if self._sums_in_attribute else self.item
        self.device.add(BUCKETS, self.zero.reduce_bucket_size * wide * (2 if self.zero.overlap_comm else 1))
        self._has_bucket = True

    def _pass(self, parameter: HeldParameter) -> None:
        """Let a gradient pass through the bucket (reduce_independent_p_g_buckets_and_remove_grads)."""
        if sum(one.numel for one in self._filled) + parameter.numel > self.zero.reduce_bucket_size:
            self._reduce()
        if self.zero.contiguous_gradients and parameter.numel <= self.zero.reduce_bucket_size:
            self.device.release(GRADIENTS, self._in_parameters.pop(parameter.name))  # the bucket has its copy
        self._filled.append(parameter)

    def _reduce(self) -> None:
        """Reduce the bucket, and keep what the partition needs (reduce_ipg_grads)."""
        wide = FP32 if self._sums_in_attribute else self.item
        pieces = sum(2 if one.name in self._shared else 1 for one in self._filled)
        merged = all(self.ranks_of([one]) == 1 for one in self._filled) and not self._sums_fp32
        own = [one for one in self._filled if one.name in self._own]
        for index in {self._group_of[one.name] for one in own if self._sums_fp32}:
            self._hold_sums(index)
        flat = sum(one.numel for one in self._filled) * wide if pieces > 1 and not merged else 0
        cast = max((self._own[one.name] for one in own), default=0) * FP32 if self._sums_fp32 and wide < FP32 else 0
        with self.device.holding(BUCKETS, flat):  # they are flattened once more
            self.device.add(BUCKETS, cast)  # each is cast before it is added
            self.device.release(BUCKETS, cast)
        self._keep()
        self._filled.clear()

    def _keep(self) -> None:
        """Keep gradients of the partition (copy_grads_in_partition), and release the others."""
        for one in self._filled:
            own = self._in_parameters.get(one.name)
            if one.name not in self._own:
                if self._divides_gradients and own is not None:
                    self.device.release(GRADIENTS, self._in_parameters.pop(one.name))
            elif self._sums_fp32:
                if self.zero.offloads_optimizer and own is not None:
                    self.device.release(GRADIENTS, self._in_parameters.pop(one.name))
            elif self.zero.offloads_optimizer and own is not None:
                self.device.release(GRADIENTS, self._in_parameters.pop(one.name))
            elif self.zero.contiguous_gradients and not self.zero.offloads_optimizer:
                if not self._own_bytes:  # grads_in_partition
                    self._own_bytes = sum(p.numel for p in self.trained if p.name in self._own) * self.item
                    self.device.add(GRADIENTS, self._own_bytes)
                if own is not None:
                    self.device.release(GRADIENTS, self._in_parameters.pop(one.name))

    def _hold_sums(self, index: int) -> None:
        """Hold the sums in fp32 of a group's partition (_build_compact_grad_partition_buffer)."""
        if index not in self._sums:
            self._sums[index] = self._parts[index] * FP32
            self.device.add(GRADIENTS, self._sums[index])

    # ---- ends ----------------------------------------------------------------------------------------------------

    def end_backward(self, *, is_last: bool) -> None:
        """Reduce what is left; at stage 1 everything, after the last micro-batch."""
        if not self._divides_gradients:
            if not is_last:
                return
            if self.setting.pipelined and self.zero.contiguous_gradients:
                self._add_buckets()
            for one in self.trained:
                if one.name in self._in_parameters:
                    self._pass(one)
        self._reduce()
        if not self._sums_fp32 and self.zero.contiguous_gradients and not self.zero.offloads_optimizer:
            if self._kept_bytes:  # added to those of the micro-batches before
                self.device.release(GRADIENTS, self._own_bytes)
            else:
                self._kept_bytes = self._own_bytes
            self._own_bytes = 0
        self.device.release(BUCKETS, self.device.parts[BUCKETS] - self._fixed_buckets)
        self._has_bucket = False
        for name in list(self._in_parameters):  # _clear_param_grad_only; those of the partition are kept
            if self.zero.contiguous_gradients or name not in self._own:
                self.device.release(GRADIENTS, self._in_parameters.pop(name))

    @property
    def _fixed_buckets(self) -> int:
        if not self.zero.offloads_optimizer:
            return 0
        largest = max(one.numel for one in self.trained) * self.item
        if self.device is not self.host:
            return largest
        return 2 * largest + sum(self._parts) * self.item

    def step(self) -> None:
        """Flatten the partition's gradients, group by group, and update it."""
        for index, group in enumerate(self.groups):
            flat = self._flatten(index)
            self._release_gradients(index, is_last=index + 1 == len(self.groups))
            self.update(group, [self._parts[index]])
            self.device.release(GRADIENTS, flat)
        self._kept_bytes = 0

    def _flatten(self, index: int) -> int:
        """Hold a vector of a group's gradients in fp32; return its bytes."""
        part = self._parts[index]
        if self.zero.offloads_optimizer:
            return 0
        if index in self._sums:  # it is one already
            return self._sums.pop(index)
        self.device.add(GRADIENTS, part * self.item)
        if self.item == FP32:
            return part * FP32
        self.device.add(GRADIENTS, part * FP32)
        self.device.release(GRADIENTS, part * self.item)
        return part * FP32

    def _release_gradients(self, index: int, *, is_last: bool) -> None:
        """Release the gradients that have been flattened; those of all groups can be in one vector."""
        for one in self.groups[index]:
            self.device.release(GRADIENTS, self._in_parameters.pop(one.name, 0))
        if is_last:
            self.device.release(GRADIENTS, self._kept_bytes + sum(self._sums.values()))
            self._sums.clear()


def partitions_to_plan(held: HeldStage, setting: EngineSetting) -> list[int]:
    """Return ranks of which one needs most memory, among those that share ZeRO's states.

    At stages 1 and 2 a rank keeps the gradients of all parameters that reach into its partition. The last rank keeps
    those that come first in the backward pass, when most activations are held. `Bf16Engine`'s ranks are alike.
    """
    if setting.zero.stage not in (1, 2) or setting.sums_all_gradients:
        return [0]
    ranks, totals = range(min(setting.shard_ranks, 64)), list[int]()  # later ones are like these
    for rank in ranks:
        engine = FlatEngine(held, setting, Ledger(), Ledger(), rank)
        totals.append(sum(one.numel for one in engine.trained if engine.keeps(one)))
    return sorted({0, totals.index(max(totals)), setting.shard_ranks - 1})
