"""Kernels: which implementation computes an operation of the layers.

PyTorch's are the reference and the default. On a GPU, kernels of installed libraries replace them, each after a check
on small inputs that it computes the same. Other packages add a candidate with
`KERNELS[operation].register(name, Candidate(...))`.
"""

from megatron_ds.layers.kernels import triton  # noqa: F401  # registered first: `auto` prefers our own

# isort: split
from megatron_ds.layers.kernels import flash, liger  # noqa: F401  # they register themselves

# isort: split
from megatron_ds.layers.kernels import varlen  # noqa: F401  # torch's own, for what those leave out

# isort: split
from megatron_ds.layers.kernels import flex  # noqa: F401  # last, because its kernels are compiled first
from megatron_ds.layers.kernels.by_call import KernelsByCall
from megatron_ds.layers.kernels.cross_entropy import LogitFinish, LossCall
from megatron_ds.layers.kernels.reference import AttentionCall, Gated, Rotary, RotaryCall
from megatron_ds.layers.kernels.select import check_choice, select_kernels
from megatron_ds.layers.kernels.table import KERNELS, REFERENCE, Candidate, Kernels, Operation

__all__ = [
    "KERNELS",
    "REFERENCE",
    "AttentionCall",
    "Candidate",
    "Gated",
    "Kernels",
    "KernelsByCall",
    "LogitFinish",
    "LossCall",
    "Operation",
    "Rotary",
    "RotaryCall",
    "check_choice",
    "select_kernels",
]
