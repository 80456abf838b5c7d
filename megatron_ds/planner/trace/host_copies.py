"""Copies between a device and its host that are recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ds.planner.operations import HostCopy
from megatron_ds.planner.trace.recorder import Recorder


class RecordedCopies:
    """The `Copies` of a trace. What is on the host counts among the recorder's bytes that are left out."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def to_host(self, x: Tensor) -> Tensor:
        host = torch.empty_like(x)
        self._recorder.leave_out(host)
        self._recorder.record(HostCopy(x.nbytes, to_host=True))
        return host

    def begin_fetch(self, host: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return torch.empty_like(host), self._recorder.begin(HostCopy(host.nbytes, to_host=False))

    def wait(self, event: Callable[[], None]) -> None:
        event()
