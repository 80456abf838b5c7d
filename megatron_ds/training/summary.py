"""A run in a few facts: what the start-up summary shows, and the FLOPs of a token."""

from __future__ import annotations

import platform
from collections.abc import Collection
from math import prod

import torch

from megatron_ds.data import Dataset
from megatron_ds.engine import Engine
from megatron_ds.hf.family import EMBEDDING
from megatron_ds.hf.weights import Tables
from megatron_ds.models.block import block_cost
from megatron_ds.models.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from megatron_ds.monitor import RunSummary, model_flops_per_token
from megatron_ds.training.resolve import ResolvedRun


def summarize(resolved: ResolvedRun, engine: Engine, data: Dataset) -> RunSummary:
    """Collective: pipeline stages tell each other their parameters."""
    run, layout = resolved.run, resolved.plan.layout
    return RunSummary(
        model_name=_model_words(resolved),
        num_params=engine.count_params(),
        world_size=layout.world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        sequence=run.parallel.sequence,
        zero_stage=resolved.plan.summary.zero_stage,
        precision=resolved.plan.summary.precision,
        device=_device_words(engine.device),
        tokens_per_step=run.train.global_batch_size * positions_of(data),
        steps=run.train.steps,
        data_description=data.describe(),
        output=run.output,
    )


def _model_words(resolved: ResolvedRun) -> str:
    """Such as `llama`, or `llama with adapters of 1.2 M parameters`."""
    name = resolved.hf.family.model_type
    if resolved.model.adapters is None:
        return name
    trained = _count(resolved.model.adapters, resolved.model.adapters.table)
    return f"{name} with adapters of {trained / 1e6:,.3g} M parameters"


def _count(tables: Tables, names: Collection[str]) -> int:
    """Elements of the named native parameters."""
    shapes = (row.op.native_shape(tables.axis_sizes) for name, row in tables.table.items() if name in names)
    return sum(map(prod, shapes))


def positions_of(data: Dataset) -> int:
    """A sample's: those of its inputs, and those of its targets where a decoder of their own reads them."""
    return data.seq_length + (data.target_length or 0)


def flops_per_position(resolved: ResolvedRun, num_params: int, data: Dataset) -> float:
    """FLOPs of one position, on average; see `model_flops_per_token`. Tables that are only looked up cost none."""
    core = resolved.hf.core
    if isinstance(core, EncoderDecoderConfig):
        assert data.target_length is not None
        return _encoder_decoder_flops(core, data.seq_length, data.target_length) / positions_of(data)
    looked_up = 0
    if isinstance(core, DecoderConfig) and not core.tied:
        looked_up += core.vocab_size * core.embedding_size
    if isinstance(core, EncoderConfig):
        looked_up += core.num_token_types * core.hidden_size
    if core.positions is not None:
        looked_up += core.positions.rows * core.hidden_size
    width = core.num_heads * core.head_dim
    frozen = _count(resolved.hf, resolved.model.frozen) - (looked_up if EMBEDDING in resolved.model.frozen else 0)
    return model_flops_per_token(num_params - looked_up, core.num_layers, width, data.seq_length, max(0, frozen))


def _encoder_decoder_flops(core: EncoderDecoderConfig, inputs: int, targets: int) -> float:
    """Of one sample: 6 for each multiplication of a forward pass, matrices and attention alike."""
    encoder, decoder = core.encoder, core.decoder
    width = decoder.num_heads * decoder.head_dim
    across = 2 * core.hidden_size * decoder.num_kv_heads * decoder.head_dim  # keys and values of the encoder's states
    matrices = encoder.num_layers * block_cost(encoder) * inputs
    matrices += decoder.num_layers * ((block_cost(decoder) - across) * targets + across * inputs)
    matrices += core.vocab_size * core.hidden_size * targets
    attention = encoder.num_layers * encoder.num_heads * encoder.head_dim * inputs * inputs
    attention += decoder.num_layers * width * targets * (targets + inputs)
    return 6.0 * (matrices + 2 * attention)


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''} a rank)"
