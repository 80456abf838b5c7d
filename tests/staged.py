"""Several ranks on one device: the collectives of torch.distributed carry tensors through host memory. For tests alone.

NCCL before 2.30 refuses two ranks on one GPU, and gloo lacks half of the collectives for CUDA tensors. Here every
collective copies its tensors to the host, runs there on gloo, and copies the results back when it is waited for. What
runs on the device, kernels, streams and DeepSpeed's CUDA paths, is what runs under NCCL. As under NCCL, a result that
is read before `wait` is stale. Unlike NCCL, 16-bit tensors are summed in fp32 and rounded once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from megatron_ds.parallel import grid

WRITTEN = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "send": None,
    "isend": None,
    "recv": "tensor",
    "irecv": "tensor",
    "gather": "gather_list",
    "scatter": "tensor",
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor",
    "all_gather_single": "output_tensor",
    "reduce_scatter": "output",
    "reduce_scatter_tensor": "output",
    "reduce_scatter_single": "output",
    "all_to_all": "output_tensor_list",
    "all_to_all_single": "output",
}
"""The argument of each collective that it writes."""

_NARROW = (torch.bfloat16, torch.float16)


@dataclass
class Staging:
    """How this process stages.

    Attributes:
        everything: stage CPU tensors too, to test the staging without a device.
        calls: number of staged calls by collective.
        coalescing: inside torch's coalescing manager, where only the last call, or none, is waited for.
    """

    everything: bool
    calls: dict[str, int]
    coalescing: bool = False

    def applies_to(self, value: Any) -> bool:
        """Return whether a value is a tensor, or has tensors, that gloo is not given as they are."""
        if isinstance(value, (list, tuple)):
            return any(self.applies_to(one) for one in value)
        return isinstance(value, Tensor) and (self.everything or value.device.type != "cpu")


class StagedWork:
    """The work of gloo, after which the results are copied to the device."""

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        self._work, self._finish, self._finished = work, finish, False

    def wait(self, timeout: Any = None) -> bool:
        if not self._finished:
            if self._work is not None:
                self._work.wait()
            self._finish()
            self._finished = True
        return True

    def is_completed(self) -> bool:
        return self._finished or self._work is None or bool(self._work.is_completed())

    def get_future(self) -> torch.futures.Future[None]:
        self.wait()
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future


def stage_collectives(everything: bool = False) -> Staging:
    """Replace the collectives of torch.distributed in this process, and NCCL by gloo. Call it before joining a group.

    Args:
        everything: stage CPU tensors too.
    """
    staging = Staging(everything, {})
    for name, written in WRITTEN.items():
        if hasattr(c10d, name):
            _replace(name, _staged(name, getattr(c10d, name), written, staging))
    for name in ("init_process_group", "new_group", "barrier"):
        _replace(name, _on_gloo(getattr(c10d, name)))

    @contextlib.contextmanager
    def coalesce(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[StagedWork]:
        staging.coalescing = True
        try:
            yield StagedWork(None, lambda: None)
        finally:
            staging.coalescing = False

    c10d._coalescing_manager = coalesce
    grid.meet_neighbours = lambda *args: None  # tensor ranks communicate through the collectives above
    return staging


def _replace(name: str, function: Callable[..., Any]) -> None:
    for module in (dist, c10d):
        if hasattr(module, name):
            setattr(module, name, function)


def _staged(name: str, real: Callable[..., Any], written: str | None, staging: Staging) -> Callable[..., Any]:
    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not any(map(staging.applies_to, given.values())):
            return real(*args, **kwargs)
        staging.calls[name] = staging.calls.get(name, 0) + 1
        size = dist.get_world_size(given.get("group"))
        mean = given.get("op") == dist.ReduceOp.AVG  # which gloo lacks
        near = {key: _to_host(value, sums="op" in signature.parameters) for key, value in given.items()}
        if mean:
            near["op"] = dist.ReduceOp.SUM
        result = real(**near)

        def finish() -> None:
            if written is not None and given.get(written) is not None:
                _copy_back(given[written], near[written], size if mean else 1)

        is_work = given.get("async_op", False) or name in ("isend", "irecv")
        work = StagedWork(result if is_work else None, finish)
        if not is_work or staging.coalescing:
            work.wait()
        return work if is_work else result

    call.__name__ = name
    return call


def _to_host(value: Any, sums: bool) -> Any:
    """Return a copy of a tensor, or of a list of them, on the host; another value as it is."""
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return [_to_host(one, sums) for one in value]
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float32 if sums and value.dtype in _NARROW else value.dtype
    return value.detach().to("cpu", dtype, copy=True).contiguous()


def _copy_back(far: Any, near: Any, divisor: int) -> None:
    if isinstance(far, (list, tuple)):
        for one, copied in zip(far, near, strict=True):
            _copy_back(one, copied, divisor)
        return
    with torch.no_grad():
        far.detach().copy_(near / divisor if divisor > 1 else near)


def _on_gloo(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return `init_process_group`, `new_group` or `barrier` for gloo, which serves no device."""

    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        if "backend" in signature.parameters:
            given["backend"] = "gloo"
        for name in ("device_id", "device_ids", "pg_options"):
            given.pop(name, None)
        return real(**given)

    return call
