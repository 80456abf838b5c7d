"""A model over several pipeline stages: the same layers as a DeepSpeed PipelineModule (1F1B; Narayanan et al. 2021)."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_ds.engine.pipeline.boundary import Boundary
from megatron_ds.models.sequential import LayerSpec, head_of, input_activations, register_layers
from megatron_ds.parallel.grid import Layout


class _DeepSpeedLayer(DeepSpeedLayerSpec):
    """Adapter from `LayerSpec` to DeepSpeed's class: built only on the rank that owns it."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(nn.Module)
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()


class _TiedGradient:
    """The gradient of a tied parameter, where DeepSpeed 0.19.8 looks for it.

    It sums `_hp_grad` in its optimizer for bf16 at ZeRO-1, and `grad` in others. With offload one of the others adds up
    the gradients of bf16 in fp32, in `grad_accum`, and `grad` is None: without this class, each copy would be updated
    by the gradient of its own stage alone.

    Args:
        parameter: a tied parameter, after the last backward pass of a step.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._hp_grad: Tensor | None = getattr(parameter, "_hp_grad", None)
        self.grad: Tensor | None = parameter.grad
        if self.grad is None:
            self.grad = getattr(parameter, "grad_accum", None)


class PipelinedModel(PipelineModule):
    """Layers from `bounds[p]` to `bounds[p + 1]` on pipeline rank p, under the names of the plain model.

    The activations that cross a boundary are those that the layer after it declares. Tied parameters are one tensor if
    their layers are on the same rank; otherwise each rank has a copy, and the gradients of the copies are summed before
    the step.

    Args:
        specs: all layers of the model.
        bounds: first layer of each pipeline stage, and the number of layers; see `pipeline.partition`.
        layout: sizes of the grid; DeepSpeed's topology has the same rank order.
        num_parts: number of parts that hidden states are divided into along the sequence.
    """

    def __init__(self, specs: Sequence[LayerSpec], bounds: Sequence[int], layout: Layout, num_parts: int) -> None:
        self._bounds, self._specs, self._tied_groups = list(bounds), list(specs), list[tuple[nn.Parameter, Any]]()
        shards = layout.data * layout.context  # a fourth axis would leave context out of DeepSpeed's sums, and its norm
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=shards)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds and partition
            super().__init__([_DeepSpeedLayer(spec) for spec in specs], topology=topology)
        start, stop = self._local_start, self._local_stop
        self._entry = Boundary(specs[start], num_parts)
        self._exit = Boundary(specs[stop], num_parts) if stop < len(specs) else None
        self.is_last = self._exit is None
        self.labels: deque[Mapping[str, Tensor] | None] = deque()
        self.shapes: dict[str, torch.Size] = {}
        self.head_spec = head_of(specs)
        self.scales: Sequence[float] = [0.0] * len(self.head_spec.terms)
        self.sums = torch.zeros(self.head_spec.num_sums)
        self.predicted: dict[str, Tensor] | None = None
        self._entered: tuple[torch.Size, torch.dtype] | None = None  # the hidden states that entered last

    def forward(self, entering: tuple[Tensor, ...]) -> Any:
        """Map the activations of the entry boundary to those of the next one; on the last stage, to the scaled loss.

        Labels arrive in the order in which DeepSpeed loads micro-batches and runs them.
        """
        self._entered = entering[0].shape, entering[0].dtype
        activations = self._entry.unpack(entering, self.shapes)
        layers = self.forward_funcs
        if self._exit is not None:
            for layer in layers:
                activations = layer(activations)
            return self._exit.pack(activations, self.shapes)
        for layer in layers[:-1]:
            activations = layer(activations)
        labels = self.labels.popleft()
        if labels is None:
            self.predicted = layers[-1](activations)
            return self.sums.new_zeros(())  # DeepSpeed accumulates the output as a loss
        losses = layers[-1](activations, labels)
        self.sums += losses.detach()
        return self.head_spec.scaled_loss(losses, self.scales)

    def run_alone(self, batch: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Run this stage's forward pass on hidden states that are drawn at random; return a scalar to differentiate.

        The states have the shape and dtype of those that entered last; before any have, zero is returned.

        Args:
            batch: a micro-batch on the device.
            labels: its labels, for the last stage.
        """
        entering = tuple(input_activations(batch, self._specs[self._local_start].columns).values())
        if self._local_start > 0:
            if self._entered is None:
                return self.sums.new_zeros((), requires_grad=True)
            shape, dtype = self._entered
            states = torch.randn(shape, dtype=dtype, device=self.sums.device, requires_grad=True)
            entering = (states, *entering)
        kept = self.shapes, self.scales, self.sums
        self.shapes, self.scales = {name: column.shape for name, column in batch.items()}, [1.0] * len(self.scales)
        self.sums = torch.zeros_like(self.sums)
        self.labels.extend([labels] if self.is_last else [])
        leaving = self(entering)
        self.shapes, self.scales, self.sums = kept
        return leaving if self.is_last else leaving[0].float().square().mean()

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    # ---- tied parameters -------------------------------------------------------------------------------------------

    def _index_tied_modules(self) -> dict[str, Any]:
        """Name the layers, and create process groups for the parameters that several pipeline stages hold.

        Parameters of the same stages share a group: blocks that share their parameters have many.

        DeepSpeed calls this when all layers are built. Its own version ties one attribute of a module, of which a rank
        holds one; here any parameters may be tied. The first stage's copy counts in the gradient norm.
        """
        specs = self._specs[self._local_start : self._local_stop]
        for name in [name for name in self._modules if name.isdigit()]:
            del self._modules[name]
        self.renamed = register_layers(self, specs, self.forward_funcs)
        local = {self.renamed.get(name, name): parameter for name, parameter in self.named_parameters()}
        groups: dict[tuple[int, ...], Any] = {}
        for name, stages in self._holders().items():
            for ranks in self._columns_of_ranks(stages):
                if tuple(ranks) not in groups:
                    groups[tuple(ranks)] = dist.new_group(ranks)
                if self.global_rank in ranks:
                    local[name].ds_pipe_replicated = self.global_rank != ranks[0]
                    self._tied_groups.append((local[name], groups[tuple(ranks)]))
        return {}

    def _holders(self) -> dict[str, list[int]]:
        """Return name -> pipeline stages of every parameter that more than one of them holds."""
        holders: dict[str, set[int]] = {}
        owners = {spec.name: self.stage_owner(index) for index, spec in enumerate(self._specs)}
        for index, spec in enumerate(self._specs):
            for original in spec.tied.values():
                owner = next(stage for name, stage in owners.items() if original.startswith(f"{name}."))
                holders.setdefault(original, {owner}).add(self.stage_owner(index))
        return {name: sorted(stages) for name, stages in sorted(holders.items()) if len(stages) > 1}

    def _columns_of_ranks(self, stages: Sequence[int]) -> Iterator[list[int]]:
        """Yield, for each tensor and data rank, the global ranks at some pipeline stages."""
        topology = self._topo
        for data in range(topology.get_dim("data")):
            for tensor in range(topology.get_dim("model")):
                yield [topology.get_rank(pipe=stage, data=data, model=tensor) for stage in stages]

    def get_tied_weights_and_groups(self) -> list[tuple[_TiedGradient, Any]]:
        """Return the gradients that DeepSpeed sums over pipeline stages, with their groups."""
        return [(_TiedGradient(parameter), group) for parameter, group in self._tied_groups if parameter.requires_grad]

    def _synchronize_tied_weights(self) -> None:
        """Do nothing: parameters have no values yet; see `equalize_copies`."""

    @torch.no_grad()
    def equalize_copies(self) -> None:
        """Broadcast the first stage's value of each tied parameter to its copies. Collective over pipeline.

        With random initialization they may differ: a copy may be declared with another standard deviation.
        """
        for parameter, group in self._tied_groups:
            dist.broadcast(parameter.data, group_src=0, group=group)
