"""Start ranks for tests: forked from this preloaded process, with a file rendezvous and a time limit.

Ranks run on the device of DeepSpeed's accelerator, which `DS_ACCELERATOR` names: "cpu" unless it is set. Several ranks
of one GPU communicate through host memory (`staged.py`).
"""

import gc
import importlib
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils._pytree import tree_map_only

from megatron_ds import engine
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.log import quiet_libraries
from megatron_ds.parallel.grid import Grid, Layout, create_grid
from megatron_ds.parallel.launch import RankInfo, run_local
from tests.staged import stage_collectives

_DEVICE: ContextVar[torch.device] = ContextVar("device")

# What ranks import up to their first step, beyond `engine.preload`: each would for itself.
_LATE_IMPORTS = (
    "transformers.modeling_utils",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib.layout_engine"),  # each run draws its loss
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin"),  # before the first PNG
    *("peft", "torch.profiler", "megatron_ds.training.worker", "transformers.models.llama.modeling_llama"),
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


def rank_device() -> torch.device:
    """The device that `start_distributed` returned to this rank of `run_ranks` or `run_grid`."""
    return _DEVICE.get()


def on_cpu(result: Any) -> Any:
    """The same tuples, lists and dicts with their tensors on the CPU: the parent, which forks, must not use a GPU."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu"), result)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, staged: bool = False
) -> list[Any]:
    """Results of fn(RankInfo, *args) on each rank, inside an initialised process group.

    `staged` has CPU tensors carried as those of several ranks of one GPU are, which needs no word.
    """
    preload()
    shared = engine.device_type() != "cpu" and world_size > engine.device_count()

    def rank(info: RankInfo) -> Any:
        if staged or shared:
            stage_collectives(everything=staged)
        _DEVICE.set(engine.start_distributed(info, timeout_s=timeout_s))
        result = on_cpu(fn(info, *args))
        dist.barrier()  # a rank that communicates with none must not leave before the others have connected
        engine.stop_distributed()  # not after an exception: the error must be written before peers lose this rank
        return result

    return run_local(rank, world_size, timeout_s)


def run_grid(
    fn: Callable[..., Any],
    layout: Layout,
    *args: Any,
    expert: int | None = None,
    ulysses: int | None = None,
    timeout_s: float = 120.0,
    staged: bool = False,
) -> list[Any]:
    """Results of fn(Grid, *args) on each rank of a layout; see `create_grid` for `expert` and `ulysses`."""

    def on_grid(info: RankInfo, *rest: Any) -> Any:
        grid: Grid = create_grid(layout, info.rank, expert, ulysses)
        return fn(grid, *rest)

    return run_ranks(on_grid, layout.world_size, *args, timeout_s=timeout_s, staged=staged)


def run_alone(fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
    """Result of fn(*args) in one forked process without a process group; keeps this process free of threads."""
    preload()
    return run_local(lambda info: on_cpu(fn(*args)), 1, timeout_s)[0]


def run_local_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Results of fn(RankInfo, *args) on each rank, where fn joins the process group itself."""
    preload()
    return run_local(lambda info: on_cpu(fn(info, *args)), world_size, timeout_s)
