"""Several pipeline stages: the same stages as a DeepSpeed PipelineModule (1F1B; Narayanan et al. 2021), ZeRO-1."""

from __future__ import annotations

import contextlib
import io
import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_ds.engine.base import Engine, MicroBatch
from megatron_ds.engine.plain import wire_of
from megatron_ds.models.stages import LossStage, StageSpec, Wire, register
from megatron_ds.parallel.grid import Layout


class _Stage(LayerSpec):
    """A `StageSpec` in DeepSpeed's words: built only on the rank that owns it."""

    def __init__(self, spec: StageSpec) -> None:
        super().__init__(nn.Module)
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()


class _TiedStage(TiedLayerSpec):
    """A stage whose `weight` lives on two pipeline stages; DeepSpeed sums its gradients over both."""

    def __init__(self, key: str, spec: StageSpec) -> None:
        super().__init__(key, nn.Module, tied_weight_attr=["weight"])
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()


class StagePipeline(PipelineModule):
    """The stages from `bounds[p]` to `bounds[p + 1]` on pipeline rank p, under the names of the plain model.

    Args:
        specs: all stages of the model.
        bounds: where each pipeline stage begins, and the end; see `pipeline.partition`.
        layout: sizes of the grid; DeepSpeed's topology has the same rank order.
    """

    def __init__(self, specs: Sequence[StageSpec], bounds: Sequence[int], layout: Layout) -> None:
        self._bounds = list(bounds)
        tied = {spec.tied_to for spec in specs if spec.tied_to}
        layers = [
            _TiedStage(spec.tied_to or spec.name, spec) if spec.tied_to or spec.name in tied else _Stage(spec)
            for spec in specs
        ]
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds and partition
            super().__init__(layers, topology=topology)
        self._use_plain_names(specs)
        self.labels: deque[Tensor | None] = deque()
        self.loss_scale = 1.0
        self.has_loss = isinstance(self.forward_funcs[-1], LossStage)
        if self.has_loss:
            self.forward_funcs[-1] = partial(self._scaled_loss, self.forward_funcs[-1])

    def _scaled_loss(self, last: LossStage, wire: Wire) -> Tensor:
        """Loss inside the module: labels come in the order in which DeepSpeed loads micro-batches and runs them."""
        targets = self.labels.popleft()
        return last(wire) if targets is None else last(wire, targets) * self.loss_scale

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """DeepSpeed broadcasts parameters in view of autograd, which would warn of it in the backward pass."""
        super()._synchronize_tied_weights()

    def _use_plain_names(self, specs: Sequence[StageSpec]) -> None:
        """DeepSpeed names stages by number and tied ones apart; give all the names that the plain model has."""
        tied_modules = self._modules.pop("tied_modules")
        object.__setattr__(self, "tied_modules", tied_modules)  # DeepSpeed still looks it up
        for name in [name for name in self._modules if name.isdigit()]:
            del self._modules[name]
        self.renamed: dict[str, str] = {}
        for spec, module in zip(specs[self._local_start : self._local_stop], self.forward_funcs):
            register(self, spec.name, module)
            if spec.tied_to is not None:
                self.renamed[f"{spec.name}.weight"] = f"{spec.tied_to}.weight"


class PipelineEngine(Engine):
    """`Engine` around a `StagePipeline`."""

    def _step(self, batches: Sequence[MicroBatch], scale: float) -> tuple[float, float]:
        loss = self.deepspeed.train_batch(self._feed(batches, scale))
        norm = self.deepspeed.get_global_grad_norm()  # none without ZeRO, which no training run gets past the checks
        return float(loss), math.nan if norm is None else float(norm)

    def _evaluate(self, batches: Sequence[MicroBatch]) -> float:
        # DeepSpeed averages over micro-batches and data ranks: scale so that the average is the sum.
        feed = self._feed(batches, float(len(batches) * self.grid.data.size))
        self.deepspeed.total_loss = None
        total = self.deepspeed.eval_batch(feed, num_micro_batches=len(batches))
        self.deepspeed.total_loss = None
        self.deepspeed.module.train()
        return float(total)

    def logits(self, input_ids: Tensor) -> Tensor | None:
        self._forget_shapes()
        _, logits = self.deepspeed.eval_batch(
            self._feed([{"input_ids": input_ids.to(self.device)}], 1.0),
            return_logits=True,
            compute_loss=False,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )
        self._forget_shapes()
        self.deepspeed.module.train()
        return logits.float().cpu() if self.deepspeed.is_last_stage() else None

    def local_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        module: StagePipeline = self.deepspeed.module
        for name, parameter in module.named_parameters():
            yield module.renamed.get(name, name), parameter

    def _feed(self, batches: Sequence[MicroBatch], scale: float) -> Iterator[tuple[Wire, Wire]]:
        """What DeepSpeed loads, on the first and last stage; the labels go round it, to the loss inside the module."""
        module: StagePipeline = self.deepspeed.module
        module.loss_scale = scale
        for batch in batches:
            if module.has_loss:
                module.labels.append(batch.get("targets"))
            yield wire_of(batch), ()

    def _forget_shapes(self) -> None:
        """Before and after activations of another shape; and drop the logits that DeepSpeed takes for a loss."""
        self.deepspeed.total_loss = None
        self.deepspeed.reset_activation_shape()
