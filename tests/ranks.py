"""Start ranks for tests: forked from this preloaded process, with a file rendezvous and a time limit."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import transformers

from megatron_ds import engine
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.log import quiet_libraries
from megatron_ds.parallel.grid import Grid, Layout, create_grid
from megatron_ds.parallel.launch import RankInfo, run_local


@cache
def preload() -> None:
    """Import what ranks need, once in this process."""
    quiet_libraries()
    engine.preload()
    importlib.import_module("transformers.modeling_utils")  # most of what ranks take up to their first step
    for model_type in FAMILIES:
        transformers.AutoConfig.for_model(model_type)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Results of fn(RankInfo, *args) on each rank, inside an initialised process group."""
    preload()

    def rank(info: RankInfo) -> Any:
        engine.start_distributed(info, timeout_s=timeout_s)
        result = fn(info, *args)
        engine.stop_distributed()  # not after an exception: the error must be written before peers lose this rank
        return result

    return run_local(rank, world_size, timeout_s)


def run_grid(fn: Callable[..., Any], layout: Layout, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Results of fn(Grid, *args) on each rank of a layout."""

    def on_grid(info: RankInfo, *rest: Any) -> Any:
        grid: Grid = create_grid(layout, info.rank)
        return fn(grid, *rest)

    return run_ranks(on_grid, layout.world_size, *args, timeout_s=timeout_s)


def run_alone(fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
    """Result of fn(*args) in one forked process without a process group; keeps this process free of threads."""
    preload()
    return run_local(lambda info: fn(*args), 1, timeout_s)[0]


def run_local_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Results of fn(RankInfo, *args) on each rank, where fn joins the process group itself."""
    preload()
    return run_local(lambda info: fn(info, *args), world_size, timeout_s)
