"""AdamW whose averages are stored in 8 bits, in blocks of 256 elements with a scale each (Dettmers et al. 2022).

The averages of matrices (`ParamSpec.matrices`) are quantised: 2 bytes per parameter instead of 8. Embeddings, output
heads, norms and biases keep theirs in fp32, as the paper advises for embeddings. The update is a kernel of bitsandbytes
for CUDA; it has not been run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers.adamw import FUSED
from megatron_ds.engine.optimizers.guarded import ADAM_STATE, OPTIMIZERS, STEPS, GuardedOptimizer
from megatron_ds.layers.param_spec import ParamSpec

QUANTISED = "quantised"
"""Key of a parameter group: the averages of its parameters are stored in 8 bits."""

_BLOCK = 256  # elements with a common scale; the kernel's
_CODES, _SCALES = ("codes1", "codes2"), ("scales1", "scales2")  # of the averages of gradients, and of their squares


class AdamW8bit(torch.optim.AdamW):
    """AdamW with 8-bit state for the parameter groups with `QUANTISED`, and torch's AdamW for the others."""

    _maps: tuple[Tensor, Tensor] | None = None  # code -> value, (256,), of signed and of unsigned numbers

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters in `param_groups`."""
        assert closure is None, "closures are not supported"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(QUANTISED)]
        super().step()
        self.param_groups = groups
        for group in groups:
            for tensor in group["params"] if group.get(QUANTISED) else ():
                if tensor.grad is not None:
                    self._update(tensor, group)

    def _update(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        from bitsandbytes import functional

        if self._maps is None:
            signed, unsigned = (functional.create_dynamic_map(signed=signed) for signed in (True, False))
            self._maps = signed.to(tensor.device), unsigned.to(tensor.device)
        state, gradient = self.state[tensor], tensor.grad
        assert gradient is not None
        state[STEPS] += 1
        (codes1, codes2), (scales1, scales2) = ([state[name] for name in names] for names in (_CODES, _SCALES))
        functional.optimizer_update_8bit_blockwise(
            "adam",  # its weight decay is decoupled
            gradient.contiguous(),
            tensor,
            codes1,
            codes2,
            *group["betas"],
            0.0,  # of optimizers with three averages
            0.0,
            group["eps"],
            int(state[STEPS]),
            group["lr"],
            *self._maps,
            scales1,
            scales2,
            weight_decay=group["weight_decay"],
        )


@OPTIMIZERS.register("adamw8bit")
class GuardedAdamW8bit(GuardedOptimizer, AdamW8bit):
    """AdamW with 8-bit state (Dettmers et al. 2022)."""

    device_type = "cuda"
    package = "bitsandbytes"
    why_unsaved = "its blocks of 256 elements lie across parameters"

    @classmethod
    def from_section(
        cls, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
    ) -> GuardedAdamW8bit:
        """Return AdamW, fused where state is in fp32 and the device supports it."""
        return cls(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=device.type in FUSED)

    @classmethod
    def group_options(cls, spec: ParamSpec, section: OptimizerSection) -> Mapping[str, Any]:
        """Return `QUANTISED` for parameters of matrices."""
        return {QUANTISED: True} if spec.matrix_shape is not None else {}

    def kinds_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the kinds of state in fp32."""
        return (STEPS,) if group.get(QUANTISED) else ADAM_STATE

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Create the state of a tensor as zeros."""
        super().create_state(parameter, {**group, "fused": False} if group.get(QUANTISED) else group)
        if group.get(QUANTISED):
            state, device = self.state[parameter], parameter.device
            for codes, scales in zip(_CODES, _SCALES):
                state[codes] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[scales] = torch.zeros(-(-parameter.numel() // _BLOCK), device=device)
