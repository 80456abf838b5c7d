"""Optimizers under DeepSpeed: AdamW, and a base class for others, registered by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_ds.config import OptimizerSection
from megatron_ds.registry import Registry

FUSED_ADAMW = ("cpu", "cuda")  # devices on which torch updates in one pass over parameters, gradients and moments


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer that can skip a step. Derive from it first and from a torch optimizer second.

    DeepSpeed calls `step` once for each tensor that it puts into `param_groups`, when all gradients are reduced. Under
    ZeRO these are flat fp32 partitions, (n,), of many parameters: the update must be elementwise, or at least
    independent of a parameter's shape. DeepSpeed itself skips a step whose gradient norm is not finite, except with
    ZeRO-0; it does not look at the loss.

    Attributes:
        has_adam_state: whether its state is AdamW's, `exp_avg`, `exp_avg_sq` and `step` (Kingma and Ba 2015), which is
            what checkpoints hold besides the fp32 weights. Runs that save or resume with any other state are refused.
        should_step: called at the first tensor of every step; its answer must be the same on all ranks. It may
            communicate: DeepSpeed reaches this point on all ranks or on none.
    """

    has_adam_state: ClassVar[bool] = False
    should_step: Callable[[], bool] | None = None
    _answer: bool | None = None

    @classmethod
    def from_section(cls, *args: Any, **options: Any) -> GuardedOptimizer:
        """Return the optimizer of a run: `from_section(groups, section, device, **options)`.

        Args:
            groups: list of parameter groups, each `{"params": [...], "weight_decay": ...}`.
            section: the run file's `OptimizerSection`; the engine sets `lr` in `param_groups` before each step.
            device: the device of the parameters.
            options: the section's `options`; the signature of the override declares them.
        """
        raise NotImplementedError(f"{cls.__qualname__} has no from_section")

    @property
    def skipped(self) -> bool:
        """True if `should_step` refused this step."""
        return self._answer is False

    def begin_step(self) -> None:
        """Let the next call of `step` ask `should_step` again."""
        self._answer = None

    def step(self, closure: Any = None) -> Any:
        """Update the parameters in `param_groups`, unless this step is to be skipped."""
        if self._answer is None:
            self._answer = self.should_step() if self.should_step is not None else True
        return super().step(closure) if self._answer else None

    def create_state(self, parameter: Tensor) -> None:
        """Create AdamW's state as zeros if it is missing, so that a checkpoint can be read into it.

        Args:
            parameter: a tensor that DeepSpeed put into `param_groups`, (n,) or a parameter's own shape.
        """
        if self.state[parameter] or not self.has_adam_state:
            return
        on_device = self.defaults.get("fused") or self.defaults.get("capturable")
        device = parameter.device if on_device else torch.device("cpu")
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


OPTIMIZERS: Registry[type[GuardedOptimizer]] = Registry("optimizer")


@OPTIMIZERS.register("adamw")
class GuardedAdamW(GuardedOptimizer, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019)."""

    has_adam_state = True

    @classmethod
    def from_section(
        cls, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
    ) -> GuardedAdamW:
        """Return torch's AdamW, fused if the device supports it."""
        fused = device.type in FUSED_ADAMW
        return cls(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=fused)
