"""The grid behind the interface of a Megatron-style `mpu`, which DeepSpeed reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_ds.parallel.grid import MODEL_AXES, ROLES, Axis, Grid


class Mpu:
    """Ranks, sizes and groups of the tensor and data axes of one pipeline stage, for DeepSpeed.

    The engine of a pipeline has its own mpu; there this one serves activation checkpointing only.

    `initialize_sequence_parallel` and `get_sequence_parallel_*` are left out on purpose: DeepSpeed probes for them
    and would mistake Megatron's sequence parallelism for Ulysses'. DeepSpeed needs groups for axes of size 1 too, so
    the construction is collective over the world.
    """

    def __init__(self, grid: Grid) -> None:
        self._tensor, self._data = grid.tensor, grid.shard
        self._tensor_group = process_group(grid, grid.tensor, grid.layout.peers(*MODEL_AXES))
        self._data_group = process_group(grid, grid.shard, grid.layout.peers(*ROLES["shard"]))

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor_group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._data.ranks)

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def process_group(grid: Grid, axis: Axis, groups: Sequence[tuple[int, ...]]) -> dist.ProcessGroup:
    """Return the process group of an axis, which DeepSpeed needs for one of size 1 too. Collective over the world.

    Args:
        grid: the grid.
        axis: of this rank.
        groups: the same axis of every rank, by their ranks.
    """
    if axis.group is not None:
        return axis.group
    if grid.layout.world_size == 1:
        world = dist.group.WORLD
        assert world is not None, "torch.distributed is not initialised"
        return world
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if grid.rank in ranks:
            own = group
    assert own is not None
    return own
