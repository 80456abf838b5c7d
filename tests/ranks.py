"""Start ranks for tests: forked from this preloaded process, with a file rendezvous and a time limit."""

import gc
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

# What ranks import up to their first step, beyond `engine.preload`: each would for itself.
_LATE_IMPORTS = (
    "transformers.modeling_utils",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
)


@cache
def preload() -> None:
    """Import what ranks need, once in this process."""
    quiet_libraries()
    engine.preload()
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    for model_type in FAMILIES:
        transformers.AutoConfig.for_model(model_type)
    gc.collect()
    gc.freeze()  # ranks collect garbage (ZeRO-3 does at its start) among their own objects, not among these million


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
