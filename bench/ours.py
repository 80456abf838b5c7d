"""Ours: a run as `megatron-ds train` would read it, and its engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.contestant import Step
from bench.work import MASKED_MODELS, Spec, Work
from megatron_ds.config import build_run
from megatron_ds.parallel.grid import Grid
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.training.resolve import resolve_run
from megatron_ds.training.worker import build


def train(spec: Spec) -> Step:
    """Options: `tensor`, `pipeline`, `sequence`, `shared_memory`, `zero`, `micro_batch`, `compile`."""
    rank = dist.get_rank()
    resolved = resolve_run(build_run(_run_of(spec)), spec.world, spec.device)
    device = torch.device(spec.device, rank) if spec.device == "cuda" else torch.device(spec.device)
    engine = build(resolved, RankInfo(rank, spec.world, rank), device)
    batches = _micro_batches(spec.work, engine.grid, resolved.run.train.micro_batch_size)
    return lambda: engine.train_step(batches, spec.work.lr).loss


def _run_of(spec: Spec) -> dict[str, Any]:
    """What a user would write. ZeRO-1, or ZeRO-0 in fp32 where there is nothing to shard."""
    work, options = spec.work, spec.options
    tensor, pipeline = options.get("tensor", 1), options.get("pipeline", 1)
    data = spec.world // tensor // pipeline
    nothing_to_shard = pipeline == data == 1 and work.dtype == "fp32"
    return {
        "model": {"path": spec.folder},
        "parallel": {
            "tensor": tensor,
            "pipeline": pipeline,
            "sequence": options.get("sequence", False),
            "shared_memory": options.get("shared_memory", False),
        },
        "deepspeed": {
            "zero_optimization": {"stage": options.get("zero", 0 if nothing_to_shard else 1)},
            "bf16": {"enabled": work.dtype == "bf16"},
        },
        "data": {"format": "tokenized", "train": [f"{spec.folder}/none.jsonl"], "seq_length": work.seq_length},
        "optimizer": {
            "lr": work.lr,
            "betas": [0.9, 0.999],
            "weight_decay": 0.1,
            "decay_all": True,
            "grad_clip": work.grad_clip,
        },
        "train": {
            "steps": 1,
            "global_batch_size": work.batch,
            "micro_batch_size": options.get("micro_batch", work.batch // data),
            "recompute": "full" if work.recompute else "none",
            "compile": options.get("compile", False),
        },
        "output": f"{spec.folder}-out",
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
