"""An exponential moving average of the weights, kept next to the optimizer's state (Polyak and Juditsky 1992).

After each step the average is decay * average + (1 - decay) * weights, in fp32, element by element, so that it lies in
shards as the masters do and needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

EMA = "ema"
"""The name of the average in an optimizer's state."""


class WeightAverage:
    """The average of all tensors that an optimizer updates.

    Args:
        decay: between 0 and 1, exclusive.
        start_step: the number of steps after which the average begins, with the weights at that time.
    """

    def __init__(self, decay: float, start_step: int) -> None:
        self._start_step, self._average = start_step, get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Update the averages of the tensors in `param_groups`.

        Args:
            optimizer: the optimizer, after its step.
            step: the number of this step in the run, from 1, skipped ones counted.
        """
        weights: list[Tensor] = [one for group in optimizer.param_groups for one in group["params"]]
        averages: list[Tensor] = [optimizer.state[one][EMA] for one in weights]
        if step <= self._start_step:
            _copy(averages, weights)
        elif weights:
            self._average(averages, weights, step)


def begin_average(optimizer: torch.optim.Optimizer, parameters: Iterable[Any]) -> None:
    """Let the average of each tensor be its present value, (n,) or a parameter's own shape."""
    for parameter in parameters:
        optimizer.state[parameter][EMA] = parameter.detach().clone()


def _copy(places: list[Tensor], tensors: list[Tensor]) -> None:
    for place, tensor in zip(places, tensors):
        place.copy_(tensor)
