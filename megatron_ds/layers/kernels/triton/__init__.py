"""Our own GPU kernels, in Triton (Tillet et al. 2019), one file per operation.

Triton is imported when a kernel is made, never before: `ours` loads the file of a kernel. On a CPU the kernels
run in Triton's interpreter, where TRITON_INTERPRET=1 is set before triton is imported: tests do that.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from megatron_ds.layers.kernels.table import KERNELS, Candidate


def ours(file: str, function: str) -> Candidate:
    """Return the candidate that a function in a file of this package computes; the file is loaded when it is made."""

    def make() -> Callable[..., Any]:
        return getattr(import_module(f"{__name__}.{file}"), function)

    return Candidate("triton", make, "triton")


for _operation, _file in {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "fp32_rms_norm": "norm",
    "swiglu": "gated",
    "geglu": "gated",
    "rotary": "rotary",
    "cross_entropy": "cross_entropy",
}.items():
    KERNELS[_operation].register("triton", ours(_file, _operation))
