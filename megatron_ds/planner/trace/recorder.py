"""The operations and the memory of layers while they run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from megatron_ds.layers.recompute import is_replaying
from megatron_ds.planner.operations import Attention, Collective, HostCopy, Message, Operation, Product, Work
from megatron_ds.planner.trace.operator_results import OperatorResults
from megatron_ds.planner.trace.operators import operations_of
from megatron_ds.planner.trace.storages import LiveStorages

_ADD_PRODUCT = torch.ops.aten.addmm.dtype_out


class Recorder(LiveStorages):
    """`LiveStorages` that also lists operations, and when memory changes.

    Args:
        results: of operators on tensors without values, from other traces too; None = of this one.

    Attributes:
        work: all operations since `begin_pass`; `replayed`: those of them that repeat a forward pass.
        changes: changes of memory since `begin_pass`: (storage, bytes).
    """

    def __init__(self, results: OperatorResults | None = None) -> None:
        super().__init__()
        self._results = results or OperatorResults()
        self.work, self.replayed = Work(), Work()
        self.changes: list[tuple[int, int]] = []
        self._num_computed = 0
        self._under_way: list[Callable[[], None]] = []

    def begin_pass(self) -> None:
        """Begin with empty lists."""
        self.end_pass()
        self.work, self.replayed, self.changes = Work(), Work(), []
        self.reset_peak()

    def end_pass(self) -> None:
        """Record communication that nobody has waited for."""
        for settle in list(self._under_way):
            settle()

    def record(self, operation: Operation) -> None:
        """Count an operation."""
        self.work[operation] += 1
        if is_replaying():
            self.replayed[operation] += 1
        self._num_computed += isinstance(operation, Product | Attention)

    def begin(self, operation: Collective | Message | HostCopy) -> Callable[[], None]:
        """Return what records communication that begins now; it is hidden if products are computed until then."""
        begun = self._num_computed

        def settle() -> None:
            if settle in self._under_way:
                self._under_way.remove(settle)
                self.record(replace(operation, hidden=self._num_computed > begun))

        self._under_way.append(settle)
        return settle

    def peak_without(self, left_out: Collection[int | None], begin: int = 0, end: int | None = None) -> tuple[int, int]:
        """Return the peak and the end of the sum of `changes[begin:end]`, without those of some storages."""
        live = peak = 0
        for storage, num_bytes in self.changes[begin:end]:
            if storage not in left_out:
                live += num_bytes
                peak = max(peak, live)
        return peak, live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for operation in operations_of(func, args, kwargs or {}, result):
            self.record(operation)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result; torch 2.11 cannot add a product to a sum of another dtype on tensors without values."""
        if func is _ADD_PRODUCT and kwargs["out"].is_meta:
            return kwargs["out"]
        return self._results.call(func, args, kwargs)

    def _change(self, serial: int, num_bytes: int) -> None:
        super()._change(serial, num_bytes)
        self.changes.append((serial, num_bytes))
