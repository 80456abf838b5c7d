"""Kernels: which implementation computes an operation of the layers.

PyTorch's are the reference and the default. On a GPU, libraries that are installed take their place, each after it has
shown on small inputs that it computes the same. Code from outside adds a candidate with
`KERNELS[operation].register(name, Candidate(...))`.
"""

from megatron_ds.layers.kernels import flash, liger  # noqa: F401  # they register themselves
from megatron_ds.layers.kernels.reference import AttentionCall
from megatron_ds.layers.kernels.select import check_choice, select_kernels
from megatron_ds.layers.kernels.table import KERNELS, REFERENCE, Candidate, Kernels, Operation

__all__ = [
    "KERNELS",
    "REFERENCE",
    "AttentionCall",
    "Candidate",
    "Kernels",
    "Operation",
    "check_choice",
    "select_kernels",
]
