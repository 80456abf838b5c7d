"""Matrix products of half-precision operands whose results and sums are fp32.

A GPU's tensor cores add in fp32 whatever the operands are. These products keep that sum instead of rounding it, and add
to one in the product itself: torch's own `+= left @ right` writes a rounded product, then reads, adds and writes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute out = left @ right. `out` has the operands' dtype, or is fp32."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.device.type == "cpu":  # torch has no such product there; those of fp32 copies are the same numbers
        torch.mm(left.float(), right.float(), out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right. `total` has the operands' dtype, or is fp32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def keep_gradient_sum(parameter: Tensor, total: Tensor) -> None:
    """Have the backward passes of products add a parameter's gradient to a tensor, instead of returning it to autograd.

    Args:
        parameter: the weight of a linear layer or of the output head.
        total: fp32, of its shape; the engine reads it and sets it to zero.
    """
    assert total.shape == parameter.shape and total.dtype == torch.float32, (total.shape, total.dtype)
    parameter.gradient_sum = total  # type: ignore[attr-defined]


def gradient_sum(parameter: Tensor | None) -> Tensor | None:
    """Return the tensor that a parameter's gradient is added to; None = autograd gets the gradient."""
    return getattr(parameter, "gradient_sum", None)
