"""Losses that keep a router balanced, and the numbers that show how balanced it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.moe.router import Routing
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Axis


class RouterLoad:
    """The sums of one layer's router over the micro-batches of a step.

    Attributes:
        sums: fp64 (E + 2,), live: the number of this rank's tokens that chose each expert, then this rank's parts of
            the load-balancing loss and of the z-loss, both without coefficients.
    """

    def __init__(self, num_experts: int, like: Tensor) -> None:
        """Begin with zeros on the device of a tensor. ZeRO-3 gives tensors of torch's own constructors its dtype."""
        self.sums = like.new_zeros(num_experts + 2, dtype=torch.float64)

    def clear(self) -> None:
        """Begin a step."""
        self.sums = torch.zeros_like(self.sums)

    def add(self, counts: Tensor, balance: Tensor, z: Tensor) -> None:
        """Add a micro-batch: (E,) counts, and two scalars."""
        self.sums[:-2] += counts
        self.sums[-2] += balance.detach()
        self.sums[-1] += z.detach()


@dataclass
class RouterSettings:
    """The coefficients of the routers' losses, and what an engine sets before each step.

    Attributes:
        aux_loss: coefficient of the load-balancing loss; None = that of the model.
        z_loss: coefficient of the z-loss.
        gradient_scale: factor of the losses' gradients in a micro-batch. It stands for what the main loss passes
            through after the model: its share of the step, and the loss scale.
    """

    aux_loss: float | None = None
    z_loss: float = 0.0
    gradient_scale: float = 1.0


class _WithLoss(torch.autograd.Function):
    """A tensor as it is, whose backward pass also differentiates a loss, times the settings' `gradient_scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, settings: RouterSettings) -> Tensor:
        ctx.settings = settings
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = ctx.settings.gradient_scale
        return grads[0], torch.full((), scale, dtype=torch.float32, device=grads[0].device), None


def with_loss(x: Tensor, loss: Tensor, settings: RouterSettings) -> Tensor:
    """Return x; where it is differentiated, so is the loss, a scalar fp32."""
    return _WithLoss.apply(x, loss, settings)


def router_losses(routing: Routing, counts: Tensor, real: Tensor | None, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Return this rank's parts of the load-balancing loss and of the z-loss of one layer and micro-batch.

    Their sums over the tensor and context ranks are the losses. The first is E / (k T^2) sum_e c_e P_e, with c_e the
    number of tokens that chose expert e and P_e the sum of their shares of it (Fedus et al. 2021): 1 if all are chosen
    alike. The second is the mean of the squared logsumexp of the logits (Zoph et al. 2022). Communication: all-reduces
    of E + 1 numbers over tensor and context.

    Args:
        routing: of this rank's tokens.
        counts: (E,), the number of these that chose each expert, without those that are not real.
        real: (T,) bool, the tokens that are not padding; None = all.
        axes: the tensor ranks and the context ranks, which route different tokens of one micro-batch.
    """
    shares, z = routing.shares, routing.logits.logsumexp(-1).square()
    count = torch.full((1,), len(shares), dtype=torch.float32, device=shares.device)
    if real is not None:
        shares, z, count = shares * real.unsqueeze(-1), z * real, real.sum(dtype=torch.float32).view(1)
    sums = torch.cat([counts.float(), count])
    for axis in axes:
        all_reduce_(sums, axis)
    global_counts, tokens = sums.split([len(counts), 1])
    tokens = tokens.clamp(min=1.0).squeeze(0)
    factor = len(counts) / (routing.chosen.shape[1] * tokens.square())
    return (global_counts * shares.sum(0)).sum() * factor, z.sum() / tokens
