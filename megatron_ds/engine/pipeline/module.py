"""Several pipeline stages: the same stages as a DeepSpeed PipelineModule (1F1B; Narayanan et al. 2021), ZeRO-1."""

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
from megatron_ds.models.sequential import LayerSpec, register_layers
from megatron_ds.parallel.grid import Layout


class _DeepSpeedLayer(DeepSpeedLayerSpec):
    """A `LayerSpec` in DeepSpeed's words: built only on the rank that owns it."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(nn.Module)
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()


class PipelinedModel(PipelineModule):
    """The stages from `bounds[p]` to `bounds[p + 1]` on pipeline rank p, under the names of the plain model.

    What enters and leaves is what the stages on both sides of a boundary declare. Parameters that are tied are one
    where their stages are on one rank; else each rank has a copy, whose gradients are summed before the step.

    Args:
        specs: all stages of the model.
        bounds: where each pipeline stage begins, and the end; see `pipeline.partition`.
        layout: sizes of the grid; DeepSpeed's topology has the same rank order.
        splits_sequence: hidden states are divided along the sequence over the tensor ranks.
    """

    def __init__(
        self, specs: Sequence[LayerSpec], bounds: Sequence[int], layout: Layout, splits_sequence: bool
    ) -> None:
        self._bounds, self._specs, self._tied_groups = list(bounds), list(specs), list[tuple[nn.Parameter, Any]]()
        topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds and partition
            super().__init__([_DeepSpeedLayer(spec) for spec in specs], topology=topology)
        divisor = layout.tensor if splits_sequence else 1
        start, stop = self._local_start, self._local_stop
        self._entry = Boundary(specs[start], divisor)
        self._exit = Boundary(specs[stop], divisor) if stop < len(specs) else None
        self.is_last = self._exit is None
        self.labels: deque[Mapping[str, Tensor] | None] = deque()
        self.shapes: dict[str, torch.Size] = {}
        self.scales = self.sums = torch.zeros(len(specs[-1].labels))
        self.predicted: dict[str, Tensor] | None = None

    def forward(self, entering: tuple[Tensor, ...]) -> Any:
        """What travels, in the order of the boundary -> the same for the next boundary; or the scaled loss.

        Labels come in the order in which DeepSpeed loads micro-batches and runs them.
        """
        activations = self._entry.unpack(entering, self.shapes)
        stages = self.forward_funcs
        if self._exit is not None:
            for stage in stages:
                activations = stage(activations)
            return self._exit.pack(activations, self.shapes)
        for stage in stages[:-1]:
            activations = stage(activations)
        labels = self.labels.popleft()
        if labels is None:
            self.predicted = stages[-1](activations)
            return self.sums.new_zeros(())  # for DeepSpeed to have something to add up
        losses = stages[-1](activations, labels)
        self.sums += losses.detach()
        return (losses * self.scales).sum()

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    # ---- tied parameters -------------------------------------------------------------------------------------------

    def _index_tied_modules(self) -> dict[str, Any]:
        """DeepSpeed ties one attribute of whole modules, of which a rank holds one; here any parameters may be tied.

        Called once all stages are built. Gives them their names, and a process group to every parameter that several
        pipeline stages hold. The first of these counts in the gradient's norm.
        """
        specs = self._specs[self._local_start : self._local_stop]
        for name in [name for name in self._modules if name.isdigit()]:
            del self._modules[name]
        self.renamed = register_layers(self, specs, self.forward_funcs)
        mine = {self.renamed.get(name, name): parameter for name, parameter in self.named_parameters()}
        for name, stages in self._holders().items():
            for ranks in self._columns_of_ranks(stages):
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    mine[name].ds_pipe_replicated = self.global_rank != ranks[0]
                    self._tied_groups.append((mine[name], group))
        return {}

    def _holders(self) -> dict[str, list[int]]:
        """Name of a parameter -> the pipeline stages that hold it, where that is more than one."""
        holders: dict[str, set[int]] = {}
        owners = {spec.name: self.stage_owner(index) for index, spec in enumerate(self._specs)}
        for index, spec in enumerate(self._specs):
            for original in spec.tied.values():
                owner = next(stage for name, stage in owners.items() if original.startswith(f"{name}."))
                holders.setdefault(original, {owner}).add(self.stage_owner(index))
        return {name: sorted(stages) for name, stages in sorted(holders.items()) if len(stages) > 1}

    def _columns_of_ranks(self, stages: Sequence[int]) -> Iterator[list[int]]:
        """For each tensor and data rank, the ranks of some pipeline stages."""
        topology = self._topo
        for data in range(topology.get_dim("data")):
            for tensor in range(topology.get_dim("model")):
                yield [topology.get_rank(pipe=stage, data=data, model=tensor) for stage in stages]

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """What DeepSpeed sums gradients of."""
        return [(parameter, group) for parameter, group in self._tied_groups if parameter.requires_grad]

    def _synchronize_tied_weights(self) -> None:
        """Nothing yet: see `equalize_copies`."""

    @torch.no_grad()
    def equalize_copies(self) -> None:
        """Give all copies of a tied parameter the value of the first, once it is filled. Collective.

        At random they need not begin alike: a copy may be declared with another deviation.
        """
        for parameter, group in self._tied_groups:
            dist.broadcast(parameter.data, group_src=0, group=group)
