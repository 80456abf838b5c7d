"""An optimizer that keeps the engine's reduced gradients for inspection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GradientProbe(torch.optim.Optimizer):
    """An optimizer that keeps gradients and never changes weights.

    DeepSpeed calls `step` when gradients are reduced over tensor, pipeline and data ranks, so these are the gradients
    that a real optimizer would see. Without ZeRO each rank sees its own parameters' gradients in full.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._kept: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Keep the current gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._kept[parameter] = parameter.grad.detach().clone()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's gradient of the last step; zeros if it had none."""
        kept = self._kept.get(parameter)
        return torch.zeros_like(parameter) if kept is None else kept
