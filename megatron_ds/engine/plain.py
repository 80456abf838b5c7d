"""One pipeline stage: a plain module under DeepSpeed's engine, ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megatron_ds.engine.base import Engine, MicroBatch
from megatron_ds.layers.parameter import counts_here
from megatron_ds.parallel.collectives import all_reduce_


class PlainEngine(Engine):
    """`Engine` around a `StageModel`."""

    def _step(self, batches: Sequence[MicroBatch], scale: float) -> tuple[float, float]:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        norm_of_stage_0 = 0.0
        for batch in batches:
            loss = self.deepspeed(wire_of(batch), batch["targets"]) * scale
            total += loss.detach()
            self.deepspeed.backward(loss)
            if self.deepspeed.zero_optimization_stage() == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                norm_of_stage_0 = self._gradient_norm()
            self.deepspeed.step()
        mean = float(all_reduce_(total, self.grid.data)) / (len(batches) * self.grid.data.size)
        norm = self.deepspeed.get_global_grad_norm()
        return mean, norm_of_stage_0 if norm is None else float(norm)

    def _gradient_norm(self) -> float:
        """L2 norm of the gradients; ZeRO-0 does not keep it. What all tensor ranks hold alike counts once."""
        axis = self.grid.tensor
        counted = [p for p in self.deepspeed.module.parameters() if p.grad is not None and counts_here(p, axis)]
        squares = torch.zeros((), dtype=torch.float32, device=self.device)
        for parameter in counted:
            squares += parameter.grad.float().square().sum()
        return float(all_reduce_(squares, axis).sqrt())

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[MicroBatch]) -> float:
        self.deepspeed.eval()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in batches:
            total += self.deepspeed(wire_of(batch), batch["targets"])
        self.deepspeed.train()
        return float(all_reduce_(total, self.grid.data))

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor | None:
        self.deepspeed.eval()
        logits = self.deepspeed((input_ids.to(self.device),))
        self.deepspeed.train()
        return logits.float().cpu()

    def local_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.deepspeed.module.named_parameters()

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        if self.deepspeed.zero_optimization_stage() < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter])


def wire_of(batch: MicroBatch) -> tuple[Tensor, ...]:
    """What enters the first stage: ids, and the key mask where the data has one, as bytes."""
    if "attention_mask" in batch:
        return batch["input_ids"], batch["attention_mask"].to(torch.uint8)
    return (batch["input_ids"],)
