"""Parameters of experts under DeepSpeed, where the expert ranks are not the tensor ranks.

On the tensor axis experts are ordinary tensor-parallel parameters. Elsewhere ranks of one data-parallel group hold
different experts, so DeepSpeed 0.19.8 must reduce and shard their gradients and states over other groups than those of
all other parameters. It learns this in four places: flags on each parameter, before ZeRO-3 divides it; its own tables
of process groups by name; parameter groups of the optimizer that are marked; and a module of its class for such layers,
without which it ignores the first three. Gradients of experts are summed over the ranks that have them and divided by
the number of data ranks: tokens have come from all ranks of the expert group, so this is the mean over data ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from megatron_ds.engine.group_tables import set_expert_groups
from megatron_ds.engine.mpu import process_group
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.parallel.grid import Grid, expert_groups


@dataclass(frozen=True)
class FoldedExperts:
    """The groups of experts' parameters that DeepSpeed reduces and shards apart from all others.

    Attributes:
        name: DeepSpeed's name of the groups.
        shard_group: process group of the ranks with the same experts, also for a single rank.
        over_tensor: tensor ranks hold different experts, or shards of the same ones.
    """

    name: str
    shard_group: dist.ProcessGroup
    over_tensor: bool

    def mark(self, parameter: Tensor) -> None:
        """Set the flags by which DeepSpeed knows a parameter of experts.

        ZeRO-1 and 2 sum the squares of gradients over all ranks of a pipeline stage, so that every rank counts its own.
        """
        flags: dict[str, Any] = {
            "allreduce": False,
            "group_name": self.name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.name,
            "ds_zero_partition_process_group": self.shard_group,
        }
        if self.over_tensor:
            flags["tensor_model_parallel"] = True
        for name, value in flags.items():
            setattr(parameter, name, value)

    @property
    def group_options(self) -> dict[str, Any]:
        """Return what marks a parameter group of the optimizer."""
        return {"moe": True, "name": self.name}


def fold_experts(grid: Grid) -> FoldedExperts | None:
    """Put the grid's groups of experts into DeepSpeed's tables; None = the experts lie on the tensor axis.

    Collective over the world.
    """
    if not grid.folds_experts:
        return None
    name = f"ep_size_{grid.expert.size}"
    divide, same = expert_groups(grid.layout, grid.expert.size)
    expert_group, shard_group = process_group(grid, grid.expert, divide), process_group(grid, grid.expert_shard, same)
    shard = shard_group, list(grid.expert_shard.ranks)
    set_expert_groups(name, (expert_group, list(grid.expert.ranks)), shard)
    return FoldedExperts(name, shard_group, grid.tensor.size > 1)


class _Marker(AutoEPMoELayer):
    """A module without parameters, by whose class DeepSpeed knows that a model has experts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 1

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Leave the groups as `fold_experts` made them."""


def declare_experts(module: nn.Module, folded: FoldedExperts | None) -> None:
    """Show DeepSpeed that parameters of experts are trained on this rank, if they are."""
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    if folded is not None and any(spec_of(parameter).is_of_experts for parameter in trained):
        module.add_module("expert_marker", _Marker())
