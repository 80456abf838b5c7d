"""Routers of a step: the scale of their losses, what they log, and the update of their biases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.monitor.metrics import MOE_TOKENS_MAX, MOE_TOKENS_MEAN, MOE_TOKENS_MIN
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.grid import Grid

METRICS = (
    "moe_aux_loss",
    "moe_z_loss",
    MOE_TOKENS_MIN,
    MOE_TOKENS_MEAN,
    MOE_TOKENS_MAX,
    "moe_busiest_layer",
    "moe_unused",
    "moe_entropy",
    "moe_dropped",
)


class Routers:
    """The routers of all layers of a model, of which this rank has those of its pipeline stage.

    Args:
        module: this rank's part of the model.
        grid: the axes and roles of this rank. The construction is collective over pipeline.
        settings: what the layers were built with.
        bias_rate: step of the biases of the choice, for each optimizer step; 0 = they stay as they are.
    """

    def __init__(self, module: nn.Module, grid: Grid, settings: RouterSettings, bias_rate: float) -> None:
        self._layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, MoE)}
        self._grid, self._settings, self._bias_rate = grid, settings, bias_rate
        found = [(name, layer.shape.router.num_experts) for name, layer in self._layers.items()]
        stages = gather_objects(found, grid.pipeline.group) if grid.pipeline.size > 1 else [found]
        self._experts = {name: experts for stage in stages for name, experts in stage}  # of all layers, in order
        self._sums: dict[str, Tensor] = {}

    @property
    def num_sums(self) -> int:
        """Length of what `collect` returns."""
        return sum(experts + 2 for experts in self._experts.values())

    def begin_step(self, num_micro_batches: int, loss_scale: float) -> None:
        """Clear the sums, and scale the gradients of the losses as DeepSpeed scales that of the main loss.

        DeepSpeed divides by the number of data and context ranks when it reduces gradients, and the losses are sums
        over context; by the number of micro-batches it divides the main loss.
        """
        self._settings.gradient_scale = loss_scale / num_micro_batches * self._grid.context.size
        self._num_micro_batches = num_micro_batches
        for layer in self._layers.values():
            layer.load.clear()

    def collect(self, device: torch.device) -> Tensor:
        """Return the sums of all layers over all ranks, fp64 (num_sums,). Collective over the world."""
        own = {name: layer.load.sums for name, layer in self._layers.items()}
        parts = [
            own[name] if name in own else torch.zeros(experts + 2, dtype=torch.float64, device=device)
            for name, experts in self._experts.items()
        ]
        total = all_reduce_(torch.cat(parts), self._grid.world)
        self._sums = dict(zip(self._experts, total.split([experts + 2 for experts in self._experts.values()])))
        return total

    def metrics(self, sums: Sequence[float]) -> Mapping[str, float]:
        """Return what a step logs, given the numbers of `collect` on the host.

        The losses are sums over layers, without coefficients, and means over micro-batches and data ranks. The tokens
        are the smallest and largest number that an expert of any layer got, and the mean over all experts. The busiest
        layer is the index of the block with the largest number; unused is the number of experts, of all layers, that
        got none. The entropy of the tokens over a layer's experts is a mean over layers, divided by its largest value.
        No token is ever dropped.
        """
        counts, losses, begin = [], [0.0, 0.0], 0
        for experts in self._experts.values():
            counts.append(sums[begin : begin + experts])
            losses = [total + one for total, one in zip(losses, sums[begin + experts : begin + experts + 2])]
            begin += experts + 2
        divisor = self._num_micro_batches * self._grid.batch.size
        every = [count for layer in counts for count in layer]
        busiest = max(zip(map(max, counts), map(_index_of, self._experts)), key=lambda layer: layer[0])
        values = (
            losses[0] / divisor,
            losses[1] / divisor,
            min(every),
            sum(every) / len(every),
            busiest[0],
            float(busiest[1]),
            float(every.count(0.0)),
            sum(map(_relative_entropy, counts)) / len(counts),
            0.0,
        )
        return dict(zip(METRICS, values, strict=True))

    @torch.no_grad()
    def update_biases(self) -> None:
        """Raise the biases of experts that got fewer tokens than the mean in the step, and lower the others.

        Every rank does the same (Wang et al. 2024). Frozen biases stay as they are.
        """
        for name, layer in self._layers.items():
            bias = layer.router.choice_bias
            if bias is not None and self._bias_rate and not hasattr(bias, "is_frozen"):
                counts = self._sums[name][:-2]
                bias += self._bias_rate * torch.sign(counts.mean() - counts).to(bias.dtype)


def _index_of(layer: str) -> int:
    """Return the index of the block that a layer is in: `blocks.3.mlp` -> 3."""
    return int(next(part for part in reversed(layer.split(".")) if part.isdecimal()))


def _relative_entropy(counts: Sequence[float]) -> float:
    """Return the entropy of a distribution, divided by that of the uniform one."""
    total = sum(counts)
    if not total or len(counts) == 1:
        return 1.0
    return -sum(count / total * math.log(count / total) for count in counts if count) / math.log(len(counts))


def find_routers(module: nn.Module, grid: Grid, settings: RouterSettings, bias_rate: float) -> Routers | None:
    """Return the routers of a model; None = it has none. Collective over pipeline."""
    routers = Routers(module, grid, settings, bias_rate)
    return routers if routers.num_sums else None


def loss_scale_of(deepspeed_engine: Any) -> float:
    """Return what the loss is multiplied by in fp16; 1 in other dtypes."""
    scaler = getattr(deepspeed_engine.optimizer, "loss_scaler", None)
    return float(getattr(scaler, "loss_scale", 1.0))
