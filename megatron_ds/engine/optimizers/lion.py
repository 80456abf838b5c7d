"""Lion: steps of equal size in every element, along the sign of an average of gradients (Chen et al. 2023).

Its steps are larger than Adam's at the same learning rate: the paper takes a third to a tenth of Adam's rate, and so
many times its weight decay, with betas of 0.95 and 0.98 for language models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers.guarded import OPTIMIZERS, GuardedOptimizer

_CHUNK = 2**24  # elements that are updated at a time: a bound of the memory of what is computed between


class Lion(torch.optim.Optimizer):
    """Lion, Algorithm 2 of the paper, with decoupled weight decay.

    Args:
        params: parameters or groups of them.
        lr: the learning rate.
        betas: weights of the average in the step's direction, and in its own update.
        weight_decay: the weights shrink by lr * weight_decay a step.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                tensors = parameter.data.view(-1), parameter.grad.reshape(-1), state["exp_avg"].view(-1)
                for weight, gradient, average in zip(*(one.split(_CHUNK) for one in tensors)):
                    _update(weight, gradient, average, group)


def _update(weight: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
    """Update a part of a parameter and of its average, (n,) each, in place."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    weight.mul_(1.0 - lr * group["weight_decay"])
    weight.add_(average.lerp(gradient, 1.0 - beta1).sign_(), alpha=-lr)
    average.lerp_(gradient, 1.0 - beta2)


@OPTIMIZERS.register("lion")
class GuardedLion(GuardedOptimizer, Lion):
    """Lion (Chen et al. 2023)."""

    state_kinds = ("exp_avg",)

    @classmethod
    def from_section(cls, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device) -> GuardedLion:
        """Return Lion with the run file's `betas`."""
        return cls(groups, lr=section.lr, betas=section.betas)

    @classmethod
    def update_bytes(cls, sizes: Sequence[int]) -> int:
        """Return the bytes of the steps' directions, fp32, of as many elements as are updated at a time."""
        return 4 * min(_CHUNK, max(sizes, default=0))
