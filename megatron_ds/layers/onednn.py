"""oneDNN's fp32 products, on CPUs where they are faster than MKL's.

torch computes fp32 products by MKL, which uses AVX2 alone on processors that are not Intel's. The oneDNN that torch
brings uses AVX-512 on all of them, but torch has no public function that calls it for fp32 tensors in their own layout.
Its operator for the CPU code that `torch.compile` generates does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VARIABLE = "MEGATRON_DS_ONEDNN"
"""The environment variable that turns these products off: 0."""
SMALLEST = 2**21
"""Multiplications of the smallest product: below, the call costs more than AVX-512 saves."""
NARROWEST = 8
"""The smallest size of a product that is as fast as MKL's; it does not use the registers of a narrower one."""


def computes(left: Tensor, right: Tensor) -> bool:
    """Return whether oneDNN multiplies left, (..., K), by right, (K, N).

    This depends on the shapes alone, and equally on M, N and K: a linear layer's product and the products of both of
    its gradients are all computed by oneDNN, or none is. Compiled code has the choice of its compiler.
    """
    if torch.compiler.is_compiling() or left.device.type != "cpu" or left.dtype != torch.float32:
        return False
    summed, columns = right.shape
    rows = left.numel() // max(summed, 1)
    if rows * summed * columns < SMALLEST or min(rows, summed, columns) < NARROWEST:
        return False
    return right.dtype == torch.float32 and faster_here() and bool(torch.backends.mkldnn.enabled)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, (..., K) and (K, N) -> (..., N), contiguous.

    It copies `left` unless that is contiguous, and `right` unless that or its transpose is: oneDNN computes other
    layouts a thousand times slower.
    """
    weight = right.t()
    if not weight.is_contiguous() and not right.is_contiguous():
        weight = weight.contiguous()
    product = torch.ops.mkldnn._linear_pointwise.default(left.flatten(0, -2), weight, None, "none", [], "")
    # not a view, in whose place a reduction may not work
    return torch.ops.aten._unsafe_view.default(product, [*left.shape[:-1], weight.shape[0]])


def faster_than_mkl(capability: str, cpu_info: str, environment: Mapping[str, str]) -> bool:
    """Return whether a processor is not Intel's, and torch uses AVX-512 on it.

    Args:
        capability: `torch.backends.cpu.get_cpu_capability()`.
        cpu_info: the content of /proc/cpuinfo.
        environment: the process's; `VARIABLE` may forbid oneDNN.
    """
    vendors = {line.partition(":")[2].strip() for line in cpu_info.splitlines() if line.startswith("vendor_id")}
    others = bool(vendors) and "GenuineIntel" not in vendors
    return others and capability == "AVX512" and environment.get(VARIABLE) != "0"


@cache
def faster_here() -> bool:
    """Return `faster_than_mkl` of this process, if its torch has both libraries."""
    path = Path("/proc/cpuinfo")
    if not (path.exists() and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return faster_than_mkl(torch.backends.cpu.get_cpu_capability(), path.read_text(), os.environ)
