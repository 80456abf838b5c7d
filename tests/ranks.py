"""Start ranks for tests: forked from this preloaded process, with a file rendezvous and a time limit."""

import importlib
from collections.abc import Callable
from typing import Any

from megatron_ds import engine
from megatron_ds.parallel.grid import Grid, Layout, create_grid
from megatron_ds.parallel.launch import RankInfo, run_local

_FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_preloaded = []


def _preload() -> None:
    """Import once what every forked rank would import again."""
    if not _preloaded:
        engine.preload()
        for family in _FAMILIES:
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        _preloaded.append(True)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Results of fn(RankInfo, *args) on each rank, inside an initialised process group."""
    _preload()

    def rank(info: RankInfo) -> Any:
        engine.start_distributed(info, timeout_s=timeout_s)
        try:
            return fn(info, *args)
        finally:
            engine.stop_distributed()

    return run_local(rank, world_size, timeout_s)


def run_grid(fn: Callable[..., Any], layout: Layout, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Results of fn(Grid, *args) on each rank of a layout."""

    def on_grid(info: RankInfo, *rest: Any) -> Any:
        grid: Grid = create_grid(layout, info.rank)
        return fn(grid, *rest)

    return run_ranks(on_grid, layout.world_size, *args, timeout_s=timeout_s)


def run_alone(fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
    """Result of fn(*args) in one forked process without a process group; keeps this process free of threads."""
    _preload()
    return run_local(lambda info: fn(*args), 1, timeout_s)[0]
