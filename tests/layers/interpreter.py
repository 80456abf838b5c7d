"""Triton's interpreter, made to round as GPUs do: by itself it cuts the last bits of a bf16 number off."""

from functools import cache
from typing import Any

import numpy as np
import torch


@cache
def round_to_nearest() -> None:
    """Make casts from fp32 to bf16 round to the nearest number, ties to even; nothing is changed on a GPU."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut_off(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    interpreter._convert_float = convert
