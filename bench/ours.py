"""Ours, through the engine that `megatron-ds train` uses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.contestant import Step
from bench.work import MASKED_MODELS, Spec, Work
from megatron_ds.config import OptimizerSection
from megatron_ds.engine import EngineOptions, build_engine
from megatron_ds.hf.config import read_model
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.build import model_stages
from megatron_ds.parallel.grid import Grid, Layout, create_grid


def train(spec: Spec) -> Step:
    """Options: `tensor`, `pipeline`, `sequence`, `zero`, `micro_batch`, `compile`."""
    work, options = spec.work, spec.options
    tensor, pipeline = options.get("tensor", 1), options.get("pipeline", 1)
    layout = Layout(tensor, pipeline, spec.world // tensor // pipeline)
    grid = create_grid(layout, dist.get_rank())
    micro = options.get("micro_batch", work.batch // layout.data)
    weights = HFWeights(spec.folder, read_model(spec.folder))
    engine = build_engine(
        lambda at: model_stages(weights.model.core, at),
        grid,
        torch.device(spec.device, grid.rank) if spec.device == "cuda" else torch.device(spec.device),
        EngineOptions(
            deepspeed=_config(work, options, layout, micro),
            optimizer=OptimizerSection(lr=work.lr, betas=(0.9, 0.999), weight_decay=0.1, decay_all=True),
            sequence=options.get("sequence", False),
            recompute="full" if work.recompute else "none",
            seed=1,
            compiled=options.get("compile", False),
        ),
        weights.share,
    )
    batches = _micro_batches(work, grid, micro)
    return lambda: engine.train_step(batches, work.lr).loss


def _config(work: Work, options: dict[str, Any], layout: Layout, micro: int) -> dict[str, Any]:
    plain = layout.pipeline == 1 and layout.data == 1 and work.dtype == "fp32"  # nothing to shard
    return {
        "train_batch_size": work.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": work.batch // micro // layout.data,
        "gradient_clipping": work.grad_clip,
        "zero_optimization": {"stage": options.get("zero", 0 if plain else 1)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": work.dtype == "bf16"},
        "steps_per_print": 10**9,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }


def _micro_batches(work: Work, grid: Grid, micro: int) -> list[dict[str, Tensor]]:
    """This data rank's share of the batch, in our columns."""
    given = work.batches()
    columns = {"input_ids": given["input_ids"], "targets": given["labels"]}
    if work.target_length:
        start = torch.zeros_like(given["labels"][:, :1])
        columns["decoder_input_ids"] = torch.cat([start, given["labels"][:, :-1]], dim=1)
    elif work.model["model_type"] not in MASKED_MODELS:
        columns["targets"] = given["labels"].roll(-1, dims=1)
        columns["targets"][:, -1] = -100
    share = work.batch // grid.data.size
    begin = grid.data.rank * share
    return [
        {name: column[at : at + micro] for name, column in columns.items()} for at in range(begin, begin + share, micro)
    ]
