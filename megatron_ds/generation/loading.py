"""A model for generation on this rank: its module and weights, without an engine that trains it."""

from __future__ import annotations

import math
from collections import Counter

import torch

from megatron_ds.config import check_layout
from megatron_ds.dtypes import EXPORT_DTYPES, TRAINED
from megatron_ds.engine import EngineOptions, build_module
from megatron_ds.errors import ConfigError, not_one_of
from megatron_ds.generation.generator import Generator, decoding_of
from megatron_ds.parallel.grid import Layout, create_grid
from megatron_ds.runtime import LoadedModel

AUTO_DTYPE = "auto"


def check_model(model: LoadedModel, tp: int, pp: int, dtype: str) -> torch.dtype:
    """Refuse what cannot generate, before ranks are started; return the dtype of the weights.

    Args:
        model: the model.
        tp, pp: tensor and pipeline ranks.
        dtype: see `open_generator`.

    Raises:
        ConfigError: the model does not generate text, or `dtype` is no dtype of weights.
        TopologyError: the model cannot be divided over so many ranks.
    """
    decoding_of(model.hf.core)
    check_layout(model.hf.core.shape(), tp, pp, names=("--tp", "--pp"))
    names = (AUTO_DTYPE, *EXPORT_DTYPES)
    if dtype not in names:
        raise ConfigError(f"--dtype={dtype} {not_one_of(dtype, names)}")
    if dtype != AUTO_DTYPE:
        return EXPORT_DTYPES[dtype]
    on_disk = Counter(model.weights.dtypes.values()) if model.weights is not None else Counter()
    return next((one for one, _ in on_disk.most_common() if one in EXPORT_DTYPES.values()), torch.float32)


def open_generator(
    model: LoadedModel, rank: int, device: torch.device, *, tp: int = 1, pp: int = 1, dtype: str = AUTO_DTYPE
) -> Generator:
    """Build this rank's part of a model for generation. Collective over the world, which has tp * pp ranks.

    Args:
        model: from `load_model`, with its adapters if it has some.
        rank: this process's global rank.
        device: of its tensors.
        tp, pp: tensor and pipeline ranks.
        dtype: "float32", "bfloat16" or "float16"; "auto" = that of most weights on disk.

    Raises:
        ConfigError, TopologyError: see `check_model`.
    """
    wanted = check_model(model, tp, pp, dtype)
    num_experts = model.hf.core.shape().num_experts
    grid = create_grid(Layout(tensor=tp, pipeline=pp), rank, math.gcd(num_experts, tp) if num_experts else None)
    precision = next(row.precision for row in TRAINED if row.dtype == wanted)
    switch = {precision: {"enabled": True}} if precision is not None and wanted != torch.float32 else {}
    options = EngineOptions(
        deepspeed={"zero_optimization": {"stage": 0}, **switch},
        optimizer=None,
        sequence=False,
        recompute="none",
        seed=model.seed,
    )
    built = build_module(model.layers, grid, device, options, model.read_shard, model.prepare)
    return Generator(built, model.hf.core, grid, device)
