"""One pipeline stage: a plain module under DeepSpeed's engine, ZeRO 0 to 3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megatron_ds.engine.base import Engine, MicroBatch, weights_of
from megatron_ds.engine.data_sum import average_over_data, reduces_itself
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import EXPERT
from megatron_ds.parallel.regions import OPTIMIZER, profiled


class ZeroEngine(Engine):
    """`Engine` around a `SequentialModel`."""

    _sums: Tensor  # the current step's packed losses, summed over micro-batches

    def __init__(self, *args: Any, clip: float, bucket: int) -> None:
        """Build the engine. At ZeRO-0, and at ZeRO-1 in bf16, it has gradients reduced in buckets of its own size.

        DeepSpeed would copy up to 5e8 of them at a time into one tensor, even with one data rank.

        Args:
            args: see `Engine`.
            clip: at ZeRO-0, bound of the gradient norm, in which DeepSpeed would count replicated parameters several
                times; 0 = no bound.
            bucket: number of gradient elements that data ranks reduce at a time.
        """
        super().__init__(*args)
        self._clip, self._bucket = clip, bucket
        self._stage_0 = self.deepspeed.zero_optimization_stage() == 0
        self._reduces = reduces_itself(self.deepspeed)
        if self._reduces:
            self.deepspeed.enable_backward_allreduce = False

    def _step(self, batches: Sequence[MicroBatch], scales: Sequence[float]) -> float:
        self._sums, norm = self._empty_sums(), None
        for batch in batches:
            losses = self.deepspeed(batch, self.head.labels_in(batch))
            self._sums += losses.detach()
            self.deepspeed.backward(self.head.scaled_loss(losses, scales))
            if self._reduces and self.deepspeed.is_gradient_accumulation_boundary():
                average_over_data(self.deepspeed, self.grid, self._bucket)
                norm = self._clipped() if self._stage_0 else None
            with profiled(OPTIMIZER):
                self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm()) if norm is None else norm

    def run_alone(self, batch: MicroBatch) -> Tensor:
        moved = self._begin_alone(batch)
        losses = self.deepspeed.module(moved, self.head.labels_in(moved))
        self.head.scaled_loss(losses, [1.0] * len(self.head.terms)).backward()
        return losses.detach()

    def _collect(self) -> Tensor:
        return all_reduce_(self._sums, self.grid.loss)

    def _clipped(self) -> float:
        """Clip the gradients at ZeRO-0 as torch does; return their norm before that.

        The L2 norm counts parameters that all tensor ranks hold once. Collective over tensor and loss, and over expert
        if the model has experts.
        """
        axes = self.grid.model_axes
        trained = [p for p in self.deepspeed.module.parameters() if p.grad is not None]
        counted = [p for p in trained if spec_of(p).holds_first(axes)]
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for of_experts in (False, True) if self.routers is not None else (False,):
            gradients = [p.grad for p in counted if spec_of(p).is_of_experts == of_experts]
            squares = torch.zeros_like(total)
            if gradients:
                squares += torch.stack(torch._foreach_norm(gradients)).square().sum()
            for name, axis in axes.items():
                if (name == EXPERT) == of_experts:
                    all_reduce_(squares, axis)
            total += squares
        norm = float(self.read_norm(total.sqrt()))
        if math.isfinite(norm) and norm > self._clip > 0.0:
            torch._foreach_mul_([p.grad for p in trained], self._clip / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        self.deepspeed.eval()
        total = self._empty_sums()
        for batch in batches:
            total += self.deepspeed(batch, self.head.labels_in(batch))
        self.deepspeed.train()
        return all_reduce_(total, self.grid.loss)

    @torch.no_grad()
    def _outputs(self, batch: MicroBatch) -> dict[str, Tensor] | None:
        self.deepspeed.eval()
        found = self.deepspeed(self._move(batch))
        self.deepspeed.train()
        return {name: output.float().cpu() for name, output in found.items()}

    def local_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from weights_of(self.deepspeed.module)

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if self.deepspeed.zero_optimization_stage() < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter])
