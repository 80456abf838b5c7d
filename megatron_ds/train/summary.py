"""A run in a few facts: what the start-up summary shows, and the FLOPs of a token."""

from __future__ import annotations

import platform

import torch

from megatron_ds.data import Dataset
from megatron_ds.engine import Engine
from megatron_ds.monitor import RunSummary, model_flops_per_token
from megatron_ds.train.job import Job


def summarize(job: Job, engine: Engine, data: Dataset) -> RunSummary:
    """Collective: pipeline stages tell each other their parameters."""
    run, layout = job.run, job.layout
    return RunSummary(
        model_name=job.model.family.model_type,
        num_params=engine.count_params(),
        world_size=layout.world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        sequence=run.parallel.sequence,
        zero_stage=job.facts.zero_stage,
        precision=job.facts.precision,
        device=_device_words(engine.device),
        tokens_per_step=run.train.global_batch_size * run.data.seq_length,
        steps=run.train.steps,
        data_description=data.describe(),
        output=run.output,
    )


def flops_per_position(job: Job, num_params: int) -> float:
    """FLOPs of one position; see `model_flops_per_token`. Tables that are only looked up cost none."""
    decoder = job.model.decoder
    looked_up = 0 if decoder.tied else decoder.vocab_size * decoder.embedding_size
    if decoder.positions is not None:
        looked_up += decoder.positions.rows * decoder.hidden_size
    width = decoder.num_heads * decoder.head_dim
    return model_flops_per_token(num_params - looked_up, decoder.num_layers, width, job.run.data.seq_length)


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''} a rank)"
