"""One pipeline stage: a plain module under DeepSpeed's engine, ZeRO 0 to 3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megatron_ds.engine.base import Engine, MicroBatch
from megatron_ds.layers.param_spec import counts_here
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.regions import OPTIMIZER, part


class ZeroEngine(Engine):
    """`Engine` around a `SequentialModel`."""

    _sums: Tensor  # of the step under way: the losses over all data ranks, once all micro-batches are through
    _norm: float | None = None  # and the gradient norm, where DeepSpeed keeps none

    def __init__(self, *args: Any, clip: float, bucket: int) -> None:
        """As `Engine`, and what is done here at stage 0.

        Args:
            clip: bounds the gradient norm, which DeepSpeed would count wrongly. 0 = no bound.
            bucket: gradients that data ranks reduce at a time. DeepSpeed would copy all of them into one tensor, and
                one data rank's too.
        """
        super().__init__(*args)
        self._clip, self._bucket = clip, bucket
        self._stage_0 = self.deepspeed.zero_optimization_stage() == 0
        if self._stage_0:
            self.deepspeed.enable_backward_allreduce = False

    def _step(self, batches: Sequence[MicroBatch], scales: Tensor) -> tuple[Tensor, float]:
        self._sums = torch.zeros_like(scales)
        for batch in batches:
            losses = self.deepspeed(batch, self._labels_of(batch))
            self._sums += losses.detach()
            self.deepspeed.backward((losses * scales).sum())
            if self.deepspeed.is_gradient_accumulation_boundary():
                all_reduce_(self._sums, self.grid.data)
                self._norm = self._reduced_and_clipped() if self._stage_0 else None
            with part(OPTIMIZER):
                self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm() if self._norm is None else self._norm
        return self._sums, float(norm)

    def _should_step(self) -> bool:
        return bool(self._sums.isfinite().all()) and (self._norm is None or math.isfinite(self._norm))

    def _reduced_and_clipped(self) -> float:
        """L2 norm of the gradients, which are then scaled down where it exceeds the bound, as torch's clipping does.

        DeepSpeed averages them over the data ranks first, in buckets. What all tensor ranks hold alike counts once.
        """
        if self.grid.data.size > 1:
            self.deepspeed.allreduce_gradients(bucket_size=self._bucket)
        axis = self.grid.tensor
        trained = [p for p in self.deepspeed.module.parameters() if p.grad is not None]
        counted = [p.grad for p in trained if counts_here(p, axis)]
        squares = torch.zeros((), dtype=torch.float32, device=self.device)
        if counted:
            squares += torch.stack(torch._foreach_norm(counted)).square().sum()
        norm = float(all_reduce_(squares, axis).sqrt())
        if math.isfinite(norm) and norm > self._clip > 0.0:
            torch._foreach_mul_([p.grad for p in trained], self._clip / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        self.deepspeed.eval()
        total = torch.zeros(len(self.labels), dtype=torch.float32, device=self.device)
        for batch in batches:
            total += self.deepspeed(batch, self._labels_of(batch))
        self.deepspeed.train()
        return all_reduce_(total, self.grid.data)

    @torch.no_grad()
    def outputs(self, batch: MicroBatch) -> dict[str, Tensor] | None:
        self.deepspeed.eval()
        found = self.deepspeed(self._to_device(batch))
        self.deepspeed.train()
        return {name: output.float().cpu() for name, output in found.items()}

    def local_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.deepspeed.module.named_parameters()

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if self.deepspeed.zero_optimization_stage() < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter])
