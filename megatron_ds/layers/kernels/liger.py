"""Liger's kernels: https://github.com/linkedin/Liger-Kernel."""

from __future__ import annotations

import importlib

from torch import Tensor

from megatron_ds.layers.kernels.reference import Gated, RMSNorm
from megatron_ds.layers.kernels.table import KERNELS, Candidate


def liger_rms_norm() -> RMSNorm:
    """Return Liger's RMSNorm, which takes one pass forward and one backward."""
    function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda x, weight, eps: function.apply(x, weight, eps, 0.0, "llama", False)


def liger_swiglu() -> Gated:
    """Return Liger's SwiGLU of gate and up in one tensor."""
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction

    def swiglu(wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return function.apply(gate, up)

    return swiglu


KERNELS["rms_norm"].register("liger", Candidate("liger_kernel", liger_rms_norm, "liger-kernel"))
KERNELS["swiglu"].register("liger", Candidate("liger_kernel", liger_swiglu, "liger-kernel"))
