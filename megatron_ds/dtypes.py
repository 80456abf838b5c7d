"""Floating-point types under their three names: torch's and transformers', DeepSpeed's, and safetensors'."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DType(NamedTuple):
    """One floating-point type.

    Attributes:
        dtype: torch's object.
        name: its name in torch, in config.json and in the run file.
        precision: its name as a training precision in DeepSpeed's JSON; None = no run trains in it.
        code: its name in safetensors files.
    """

    dtype: torch.dtype
    name: str
    precision: str | None
    code: str


FLOAT64 = DType(torch.float64, "float64", None, "F64")
FLOAT32 = DType(torch.float32, "float32", "fp32", "F32")
FLOAT16 = DType(torch.float16, "float16", "fp16", "F16")
BFLOAT16 = DType(torch.bfloat16, "bfloat16", "bf16", "BF16")

TRAINED = (FLOAT32, BFLOAT16, FLOAT16)
EXPORT_DTYPES = {row.name: row.dtype for row in TRAINED}
"""The dtypes in which weights are written, by name."""
DTYPE_OF_PRECISION = {row.precision: row.dtype for row in TRAINED}
NAME_OF_PRECISION = {row.precision: row.name for row in TRAINED}
DTYPE_OF_CODE = {row.code: row.dtype for row in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)}
"""The dtypes in which weights may be read, by their names in safetensors files."""
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
