"""AdamW (Loshchilov and Hutter 2019), as torch computes it."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers.guarded import OPTIMIZERS, GuardedOptimizer

FUSED = ("cpu", "cuda")  # devices on which torch updates in one pass over parameters, gradients and moments


@OPTIMIZERS.register("adamw")
class GuardedAdamW(GuardedOptimizer, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019)."""

    has_adam_state = True

    @classmethod
    def from_section(
        cls, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
    ) -> GuardedAdamW:
        """Return torch's AdamW, fused if the device supports it."""
        return cls(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=device.type in FUSED)
