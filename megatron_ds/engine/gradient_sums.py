"""Weight gradients that are added up over micro-batches in fp32 by the products that compute them.

DeepSpeed's optimizer of bf16 parameters at ZeRO-1 keeps fp32 gradients of all parameters on every rank until the step.
Without this, each product writes a bf16 gradient, autograd adds it to another, and DeepSpeed casts that, adds it and
clears it: 28 bytes of memory traffic per parameter and micro-batch, where adding in the product takes 8, and one
rounding per micro-batch. At other stages and in fp16 gradients are consumed by DeepSpeed's hooks, which read `grad`.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megatron_ds.layers.products import keep_gradient_sum

DEVICES = ("cuda",)
"""Device types on which products add in fp32; others would copy their operands."""


class GradientSums:
    """The fp32 gradients of a `BF16_Optimizer`, of which products get those of matrices.

    A bf16 gradient that reaches such a parameter in another way (of an embedding tied to the output head, of a product
    in a compiled graph) is added to the same tensor, by DeepSpeed.

    Args:
        optimizer: DeepSpeed's, with fp32 accumulation.
    """

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self._has_gradient = optimizer.fp32_groups_has_gradients
        self._places = []
        for group, parameters in enumerate(optimizer.bf16_groups):
            for index, parameter in enumerate(parameters):
                if parameter.dim() >= 2:
                    total = optimizer.fp32_groups_gradients[group][index]
                    keep_gradient_sum(parameter, total.view(parameter.shape))
                    parameter._hp_grad = total  # as DeepSpeed sets it when it adds a gradient
                    self._places.append((group, index))

    def begin_step(self) -> None:
        """Have DeepSpeed count the gradients in the norm and clip them; it forgets this after every step."""
        for group, index in self._places:
            self._has_gradient[group][index] = True


def find_gradient_sums(deepspeed_engine: Any, device: torch.device) -> GradientSums | None:
    """Return the gradient sums of an engine; None where products do not add to them."""
    optimizer = deepspeed_engine.optimizer
    sums_fp32 = isinstance(optimizer, BF16_Optimizer) and optimizer.grad_acc_dtype == torch.float32
    return GradientSums(optimizer) if sums_fp32 and device.type in DEVICES else None
