"""`Engine` for several pipeline stages: DeepSpeed's 1F1B schedule (Narayanan et al. 2021) with ZeRO-1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.engine.base import Engine, MicroBatch, weights_of
from megatron_ds.engine.data_sum import average_over_data
from megatron_ds.engine.pipeline.module import PipelinedModel
from megatron_ds.models.sequential import input_activations
from megatron_ds.parallel.collectives import all_reduce_


class PipelineEngine(Engine):
    """`Engine` around a `PipelinedModel`."""

    def __init__(self, *args: Any, bucket: int) -> None:
        """Build the engine. In bf16 it has gradients reduced in buckets of its own size, as `ZeroEngine` does.

        Args:
            args: see `Engine`.
            bucket: number of gradient elements that data ranks reduce at a time.
        """
        super().__init__(*args)
        self.deepspeed._bf16_reduce_grads = partial(average_over_data, self.deepspeed, self.grid, bucket)

    def _step(self, batches: Sequence[MicroBatch], scales: Sequence[float]) -> float:
        self.deepspeed.train_batch(self._feed(batches, scales))
        norm = self.deepspeed.get_global_grad_norm()  # None without ZeRO, which the checks of training runs refuse
        return math.nan if norm is None else float(norm)

    def _evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        feed = self._feed(batches, [0.0] * len(self.head.terms))
        self.deepspeed.total_loss = None
        self.deepspeed.eval_batch(feed, num_micro_batches=len(batches))
        self.deepspeed.total_loss = None
        self.deepspeed.module.train()
        return self._collect()

    def _outputs(self, batch: MicroBatch) -> dict[str, Tensor] | None:
        module: PipelinedModel = self.deepspeed.module
        self.deepspeed.total_loss = None  # DeepSpeed accumulates the module output as a loss; reset it
        self.deepspeed.eval_batch(
            self._feed([self._move(batch)], None), reduce_output=None, bcast_loss=False, num_micro_batches=1
        )
        self.deepspeed.total_loss = None
        module.train()
        found, module.predicted = module.predicted, None
        return {name: output.float().cpu() for name, output in found.items()} if found is not None else None

    def run_alone(self, batch: MicroBatch) -> Tensor:
        moved = self._begin_alone(batch)
        result = self.deepspeed.module.run_alone(moved, self.head.labels_in(moved))
        result.backward()
        return result.detach()

    def local_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        module: PipelinedModel = self.deepspeed.module
        for name, parameter in weights_of(module):
            yield module.renamed.get(name, name), parameter

    def _feed(
        self, batches: Sequence[MicroBatch], scales: Sequence[float] | None
    ) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        """Return what DeepSpeed loads on the first and last stage; the labels bypass it and go to the module's head.

        Args:
            batches: micro-batches of one shape.
            scales: factors of the loss terms; None = prediction, without labels.
        """
        module: PipelinedModel = self.deepspeed.module
        self._expect({name: column.shape for name, column in batches[0].items()})
        if scales is not None:
            module.scales, module.sums = scales, self._empty_sums()
        if module.is_last:
            module.labels.extend(self.head.labels_in(batch) if scales is not None else None for batch in batches)
        columns = module._specs[0].columns
        return iter([(tuple(input_activations(batch, columns).values()), ()) for batch in batches])

    def _expect(self, shapes: dict[str, torch.Size]) -> None:
        """Set the shapes of the columns that cross boundaries.

        DeepSpeed keeps the shapes of the first micro-batch: if training and validation differ in columns or lengths, it
        must exchange them again.
        """
        module: PipelinedModel = self.deepspeed.module
        columns = module._specs[0].columns
        if any(shapes.get(name) != module.shapes.get(name) for name in columns):
            self.deepspeed.reset_activation_shape()
        module.shapes = shapes

    def _collect(self) -> Tensor:
        """Return the last stage's packed losses, summed over data ranks. Collective over loss and pipeline."""
        module: PipelinedModel = self.deepspeed.module
        sums = module.sums.clone() if module.is_last else torch.zeros_like(module.sums)
        return all_reduce_(all_reduce_(sums, self.grid.loss), self.grid.pipeline)
