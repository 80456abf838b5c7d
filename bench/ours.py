"""This package as a contestant: the engine that a Python program builds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.contestant import Step
from bench.work import MASKED_MODELS, Spec, Work
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.runtime import Session, load_model


def train(spec: Spec) -> Step:
    """Train with this package's engine.

    Options: `tensor`, `pipeline`, `context`, `expert`, `sequence`, `shared_memory`, `zero`, `micro_batch`,
    `keep_attention`, `compile`.
    """
    rank = dist.get_rank()
    device = torch.device(spec.device, rank) if spec.device == "cuda" else torch.device(spec.device)
    session = Session(RankInfo(rank, spec.world, rank), device)
    engine = session.build_engine(load_model(spec.folder), **engine_fields(spec))
    batches = engine.split(columns(spec.work))
    return lambda: engine.train_step(batches, spec.work.lr).loss


def engine_fields(spec: Spec) -> dict[str, Any]:
    """Return the engine's settings as a user would write them: ZeRO-1, or ZeRO-0 in fp32 if nothing can be sharded."""
    work, options = spec.work, spec.options
    degrees = ("tensor", "pipeline", "context", "expert", "sequence", "shared_memory")
    parallel = {name: options[name] for name in degrees if name in options}
    context = parallel.get("context", {"size": 1})["size"]
    data = spec.world // parallel.get("tensor", 1) // parallel.get("pipeline", 1) // context
    nothing_to_shard = parallel.get("pipeline", 1) == data == context == 1 and work.dtype == "fp32"
    return {
        "parallel": parallel,
        "deepspeed": {
            "zero_optimization": {"stage": options.get("zero", 0 if nothing_to_shard else 1)},
            "bf16": {"enabled": work.dtype == "bf16"},
        },
        "optimizer": {
            "lr": work.lr,
            "betas": [0.9, 0.999],
            "weight_decay": 0.1,
            "decay_all": True,
            "grad_clip": work.grad_clip,
        },
        "global_batch_size": work.batch,
        "micro_batch_size": options.get("micro_batch", work.batch // data),
        "recompute": "full" if work.recompute else "none",
        "keep_attention": options.get("keep_attention", False),
        "compile": options.get("compile", False),
    }


def columns(work: Work) -> dict[str, Tensor]:
    """Return the global batch in this package's columns."""
    given = work.batches()
    columns = {"input_ids": given["input_ids"], "targets": given["labels"]}
    if work.target_length:
        start = torch.zeros_like(given["labels"][:, :1])
        columns["decoder_input_ids"] = torch.cat([start, given["labels"][:, :-1]], dim=1)
    elif work.model["model_type"] not in MASKED_MODELS:
        columns["targets"] = given["labels"].roll(-1, dims=1)
        columns["targets"][:, -1] = -100
    return columns
