"""AdamW that can skip a step, and whose state exists from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GuardedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) under DeepSpeed.

    DeepSpeed calls `step` once for each flat partition of parameters, when all gradients are reduced. Except at ZeRO-0
    it skips a step whose gradient norm is not finite; it does not look at the loss.

    Attributes:
        should_step: called at the first partition of every step; it must return the same on all ranks. It may
            communicate: DeepSpeed reaches this point on all ranks or on none.
    """

    should_step: Callable[[], bool] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answer: bool | None = None

    @property
    def skipped(self) -> bool:
        """True if `should_step` refused this step."""
        return self._answer is False

    def begin_step(self) -> None:
        """Forget the last answer: the next call of `step` asks `should_step` again."""
        self._answer = None

    def step(self, closure: Any = None) -> Any:
        """Update the parameters in `param_groups`, unless this step is skipped."""
        if self._answer is None:
            self._answer = self.should_step() if self.should_step is not None else True
        return super().step(closure) if self._answer else None

    def create_state(self, parameter: Tensor) -> None:
        """Create a parameter's state now instead of at its first step, so that a checkpoint can be read into it.

        Args:
            parameter: entry of DeepSpeed's `param_groups`, (n,) or a parameter's own shape.
        """
        if self.state[parameter]:
            return
        device = parameter.device if self.defaults["fused"] else torch.device("cpu")
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
