"""Traces of a model's own layers without their tensors: operations, bytes on the wire, and memory, of one rank.

Each distinct layer runs once, forward and backward, on tensors that have shapes but no values, with process groups that
record instead of communicate. Nothing of the process is changed: a trace needs no `torch.distributed`, and runs as well
on ranks that have it.
"""

from megatron_ds.planner.trace.layers import trace_layers
from megatron_ds.planner.trace.setting import TraceSetting
from megatron_ds.planner.trace.storages import LiveStorages

__all__ = ["LiveStorages", "TraceSetting", "trace_layers"]
