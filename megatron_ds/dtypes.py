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


TABLE = (
    DType(torch.float64, "float64", None, "F64"),
    DType(torch.float32, "float32", "fp32", "F32"),
    DType(torch.float16, "float16", "fp16", "F16"),
    DType(torch.bfloat16, "bfloat16", "bf16", "BF16"),
)
EXPORT_DTYPES = {row.name: row.dtype for row in TABLE if row.precision is not None}
"""The types that weights are written in, by name."""
DTYPE_OF_PRECISION = {row.precision: row.dtype for row in TABLE if row.precision is not None}
NAME_OF_PRECISION = {row.precision: row.name for row in TABLE if row.precision is not None}
DTYPE_OF_CODE = {row.code: row.dtype for row in TABLE}
"""The types that weights may be read in, by their names in safetensors files."""
CODE_OF_DTYPE = {row.dtype: row.code for row in TABLE}
