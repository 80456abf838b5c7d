"""Stochastic gradient descent with momentum, as torch computes it.

The momentum is a sum, not an average: m = momentum * m + g. Nesterov's form steps along g + momentum * m (Sutskever et
al. 2013). Weight decay is added to the gradient, so that it passes through the momentum.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers.adamw import FUSED
from megatron_ds.engine.optimizers.guarded import OPTIMIZERS, GuardedOptimizer
from megatron_ds.errors import ConfigError


@OPTIMIZERS.register("sgd")
class GuardedSGD(GuardedOptimizer, torch.optim.SGD):
    """SGD; with `momentum` 0 it has no state."""

    state_kinds: tuple[str, ...] | None = ("momentum_buffer",)

    @classmethod
    def from_section(
        cls,
        groups: list[dict[str, Any]],
        section: OptimizerSection,
        device: torch.device,
        *,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        nesterov: bool = False,
    ) -> GuardedSGD:
        """Return torch's SGD, fused if the device supports it."""
        if nesterov and not momentum:
            raise ConfigError("optimizer.options.nesterov=true needs a momentum; try optimizer.options.momentum=0.9")
        fused = device.type in FUSED
        made = cls(groups, lr=section.lr, momentum=momentum, nesterov=nesterov, fused=fused)
        made.state_kinds = ("momentum_buffer",) if momentum else ()
        return made
