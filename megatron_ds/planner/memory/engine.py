"""Memory that the engine holds besides activations: weights, gradients, optimizer state, buffers of reductions.

Each class follows what one optimizer of DeepSpeed 0.19.8 allocates and releases, event by event, in the order in which
a step brings them about: gradients as autograd has them, the end of a backward pass, the reduction, the update. Sizes
depend on the parameters alone, so that a step of any model takes milliseconds. The names of DeepSpeed's own attributes
stand in comments, to find the place again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.memory.ledger import Ledger
from megatron_ds.planner.memory.update import UpdateBytes
from megatron_ds.planner.moments import ModulePass
from megatron_ds.planner.zero_settings import ZeroSettings

WEIGHTS, MASTERS, OPTIMIZER, AVERAGE = "weights", "masters", "optimizer", "averaged weights"
UPDATE = "update"
GRADIENTS, BUCKETS, GATHERED = "gradients", "buckets", "gathered weights"
FP32 = 4  # bytes


@dataclass(frozen=True)
class EngineSetting:
    """Settings that the engine's memory depends on besides the parameters.

    Attributes:
        zero: DeepSpeed's settings.
        precision: "fp32", "bf16" or "fp16".
        shard_ranks: d, ranks that reduce gradients and share ZeRO's states.
        expert_shard_ranks: ranks that hold the same experts, if these are not divided over the tensor axis.
        pipelined: there are several pipeline stages.
        averages_weights: an average of the weights is kept.
        adds_in_products: products add gradients of matrices to fp32 sums; see `engine.gradient_sums`.
        compiled_layers: see `held_parameters.compiled_layers`.
        num_micro_batches: of a step.
        state_bytes: of each parameter group, what the optimizer keeps of an element.
        factor_bytes: name of a parameter -> what the optimizer keeps besides, on every rank with some of its elements.
        update_bytes: what an update needs for a while.
    """

    zero: ZeroSettings
    precision: str = "fp32"
    shard_ranks: int = 1
    expert_shard_ranks: int = 1
    pipelined: bool = False
    averages_weights: bool = False
    adds_in_products: bool = False
    compiled_layers: frozenset[int] = frozenset()
    num_micro_batches: int = 1
    state_bytes: Sequence[float] = ()
    factor_bytes: Mapping[str, int] = field(default_factory=dict)
    update_bytes: UpdateBytes = lambda parameters, sizes: 0

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return FP32 if self.precision == "fp32" else 2

    @property
    def sums_all_gradients(self) -> bool:
        """Every rank holds fp32 sums of all gradients: DeepSpeed takes its `BF16_Optimizer`."""
        return self.zero.bf16_sums


class EngineMemory(ABC):
    """The memory of an engine on one rank, during a step that is not the first.

    Args:
        held: the parameters of the stage.
        setting: of the engine.
        device, host: ledgers of the two memories; the same one where ranks compute on a CPU.
    """

    def __init__(self, held: HeldStage, setting: EngineSetting, device: Ledger, host: Ledger) -> None:
        self.held, self.setting = held, setting
        self.zero, self.device, self.host = setting.zero, device, host
        self.item, self.groups = setting.itemsize, held.groups
        self.trained = [one for group in held.groups for one in group]
        self._have: dict[str, int] = {}  # parameters that have a gradient -> its bytes

    def ranks_of(self, group: Sequence[HeldParameter]) -> int:
        """Return the number of ranks that share the state of a group."""
        return self.setting.expert_shard_ranks if group[0].apart else self.setting.shard_ranks

    @abstractmethod
    def build(self) -> None:
        """Hold what is there between two steps."""

    def follow(self, one: ModulePass) -> None:  # noqa: B027
        """Gather or release the weights of a module that begins or ends a pass."""

    @abstractmethod
    def gradient(self, parameter: HeldParameter) -> None:
        """Take a gradient, whose memory autograd has just allocated."""

    def keep_gradient(self, parameter: HeldParameter) -> None:
        """Have a parameter keep its gradient, to which autograd adds those of the next micro-batches."""
        num_bytes = parameter.numel * self.item
        self.device.add(GRADIENTS, num_bytes)
        if parameter.name in self._have:
            self.device.release(GRADIENTS, num_bytes)
        self._have[parameter.name] = num_bytes

    def release_gradients(self) -> None:
        """Release the gradients that parameters keep."""
        self.device.release(GRADIENTS, sum(self._have.values()))
        self._have.clear()

    @abstractmethod
    def end_backward(self, *, is_last: bool) -> None:
        """Follow the end of a micro-batch's backward pass, and of the step's last one."""

    @abstractmethod
    def step(self) -> None:
        """Update the weights."""

    def states(self, numel: int, group: int) -> dict[str, int]:
        """Return part -> bytes of the optimizer's state for some elements of a group."""
        average = numel * FP32 if self.setting.averages_weights else 0
        factors = sum(self.setting.factor_bytes.get(one.name, 0) for one in self.groups[group] if self.keeps(one))
        return {OPTIMIZER: round(numel * self.setting.state_bytes[group]) + factors, AVERAGE: average}

    def keeps(self, parameter: HeldParameter) -> bool:
        """Return whether the rank has state of some elements of a parameter."""
        return True

    def update(self, parameters: Sequence[HeldParameter], sizes: Sequence[int]) -> None:
        """Update parameters that are in tensors of some sizes, in one call of the optimizer."""
        memory = self.host if self.zero.offloads_optimizer else self.device
        with memory.holding(UPDATE, self.setting.update_bytes(parameters, sizes)):
            pass

    def hold_frozen(self) -> None:
        """Hold the weights that are not trained, which ZeRO below stage 3 leaves as they are."""
        self.device.add(WEIGHTS, sum(one.numel for one in self.held.parameters if not one.trains) * self.item)


class PlainEngine(EngineMemory):
    """ZeRO-0: torch's optimizer on the parameters themselves; reductions in buckets (`engine.data_sum`).

    In half precision DeepSpeed's optimizer updates masters in fp32.
    """

    def build(self) -> None:
        """Hold weights and state of all parameters."""
        self.hold_frozen()
        for index, group in enumerate(self.groups):
            numel = sum(one.numel for one in group)
            self.device.add(WEIGHTS, numel * self.item)
            self.device.add(MASTERS, 0 if self.item == FP32 else numel * FP32)
            for part, num_bytes in self.states(numel, index).items():
                self.device.add(part, num_bytes)

    def gradient(self, parameter: HeldParameter) -> None:
        """Keep it in the parameter until the update."""
        self.keep_gradient(parameter)

    def end_backward(self, *, is_last: bool) -> None:
        """Reduce the gradients after the last micro-batch."""
        if not is_last:
            return
        for of_experts in (False, True):
            chosen = [one for one in self.trained if one.apart == of_experts]
            if chosen and self.ranks_of(chosen) > 1:
                for bucket in filled_buckets(chosen, self.zero.reduce_bucket_size):
                    if len(bucket) > 1:  # one tensor is reduced in place
                        with self.device.holding(BUCKETS, sum(one.numel for one in bucket) * self.item):
                            pass

    def step(self) -> None:
        """Update in place, and release the gradients."""
        for group in self.groups:
            self.update(group, [one.numel for one in group])
        self.release_gradients()


class Bf16Engine(EngineMemory):
    """ZeRO-1 in bf16 (DeepSpeed's `BF16_Optimizer`): fp32 sums of all gradients on every rank, masters divided.

    A parameter keeps its bf16 gradient from a step's first backward pass to its end: between micro-batches it is set to
    zero and not released.

    Args:
        held, setting, device, host: see `EngineMemory`.
        rank: index of the rank among those that share the states.
    """

    def __init__(self, held: HeldStage, setting: EngineSetting, device: Ledger, host: Ledger, rank: int = 0) -> None:
        super().__init__(held, setting, device, host)
        self._own = {name for group in self.groups for name in own_elements(group, self.ranks_of(group), rank)}

    def keeps(self, parameter: HeldParameter) -> bool:
        """Return whether the rank's partition has a part of a parameter."""
        return parameter.name in self._own

    def build(self) -> None:
        """Hold flat weights and gradients of all parameters, and a part of the state."""
        self.hold_frozen()
        for index, group in enumerate(self.groups):
            ranks = self.ranks_of(group)
            padded = padded_numel(group, 2 * ranks)
            self.device.add(WEIGHTS, padded * self.item)  # bf16_groups_flat
            self.device.add(MASTERS, padded // ranks * FP32)  # fp32_groups_flat_partition
            self.device.add(GRADIENTS, padded * FP32)  # fp32_groups_gradients_flat
            for part, num_bytes in self.states(padded // ranks, index).items():
                self.device.add(part, num_bytes)
        self._kept = [one for one in self.trained if not self._is_added_in_products(one)]

    def _is_added_in_products(self, one: HeldParameter) -> bool:
        """Return whether autograd has no gradient of a parameter."""
        return self.setting.adds_in_products and one.is_added_in_products(self.setting.compiled_layers)

    def gradient(self, parameter: HeldParameter) -> None:
        """Keep it in the parameter until the update, unless a product adds it to the sum."""
        if not self._is_added_in_products(parameter):
            self.keep_gradient(parameter)
            return
        with self.device.holding(GRADIENTS, parameter.numel * self.item):
            pass

    def end_backward(self, *, is_last: bool) -> None:
        """Add the bf16 gradients to the fp32 sums, which are reduced after the last micro-batch."""
        for one in self._kept:  # _update_hp_grad casts each
            with self.device.holding(GRADIENTS, one.numel * FP32):
                pass
        if not is_last:
            return
        for group in self.groups:  # parts of the flat sums, in place; a cast to the dtype of the communication
            if self.ranks_of(group) > 1:
                part = min(self.zero.reduce_bucket_size, padded_numel(group, 2 * self.ranks_of(group)))
                with self.device.holding(BUCKETS, part * self.item):
                    pass

    def step(self) -> None:
        """Update in place, and release the bf16 gradients."""
        for group in self.groups:
            self.update(group, [padded_numel(group, 2 * self.ranks_of(group)) // self.ranks_of(group)])
        self.release_gradients()


def padded_numel(group: Iterable[HeldParameter], alignment: int) -> int:
    """Return the length of a group's flat vector."""
    return -(-sum(one.numel for one in group) // alignment) * alignment


def own_elements(group: Sequence[HeldParameter], ranks: int, rank: int) -> dict[str, int]:
    """Return the elements of each parameter that lie in a rank's partition of a group's flat vector, if any.

    Args:
        group: the parameters, in order.
        ranks: number of partitions.
        rank: index of a rank among those that share all states; experts' repeat.
    """
    size = padded_numel(group, 2 * ranks) // ranks
    first, begin, found = rank % ranks * size, 0, {}
    for one in group:
        elements = min(begin + one.numel, first + size) - max(begin, first)
        if elements > 0:
            found[one.name] = elements
        begin += one.numel
    return found


def filled_buckets(parameters: Iterable[HeldParameter], limit: int) -> Iterator[list[HeldParameter]]:
    """Yield parameters in buckets, each of which ends with the parameter that exceeds the limit."""
    bucket: list[HeldParameter] = []
    for one in parameters:
        bucket.append(one)
        if sum(other.numel for other in bucket) > limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
