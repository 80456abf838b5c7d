"""Facts about a run: the start-up summary, and the FLOPs per token."""

from __future__ import annotations

import platform
from collections.abc import Collection
from fractions import Fraction
from math import prod

import torch

from megatron_ds.config import EngineConfig, describe_context, length_stages
from megatron_ds.data import Dataset
from megatron_ds.engine import Engine
from megatron_ds.hf.family import EMBEDDING
from megatron_ds.hf.to_hf import Tables
from megatron_ds.layers.param_spec import is_untrained
from megatron_ds.models.config import ModelConfig
from megatron_ds.monitor import RunSummary, peak_flops
from megatron_ds.parallel.grid import Layout
from megatron_ds.training.resolve import ResolvedRun
from megatron_ds.training.statement import describe_run

EXPERTS = ".mlp.experts."  # in the names of parameters of experts, and of their adapters


def summarize(resolved: ResolvedRun, engine: Engine, data: Dataset, valid: Dataset | None) -> RunSummary:
    """Collect the facts of the start-up summary. Collective over the world: parameters are counted.

    Args:
        resolved: the run.
        engine: its engine.
        data, valid: the training and the validation data; None = no validation.
    """
    run, layout = resolved.run, resolved.plan.layout
    num_params = engine.count_params()
    return RunSummary(
        model_name=_describe_model(resolved),
        num_params=num_params,
        num_active_params=num_active_params(resolved, num_params),
        experts=describe_experts(resolved.hf.core, resolved.plan.config, engine.grid.expert.size, layout),
        world_size=layout.world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        sequence=run.parallel.sequence,
        context=layout.context,
        context_plan=describe_context(run.data, run.parallel, resolved.plan.context) if layout.context > 1 else "",
        zero_stage=resolved.plan.summary.zero_stage,
        precision=resolved.plan.summary.precision,
        device=_describe_device(resolved, engine.device),
        tokens_per_step=run.train.global_batch_size * positions_of(data),
        row_lengths=length_stages(run.data.seq_length, run.train.length_ramp),
        batch_sizes=run.train.batch_sizes if run.train.batch_ramp is not None else None,
        steps=run.train.num_steps,
        data_description=data.describe(),
        output=run.output,
        **(describe_run(run, data, valid, resolved.label_columns) if engine.grid.rank == 0 else {}),
    )


def _describe_model(resolved: ResolvedRun) -> str:
    """Return text such as `llama`, or `llama with adapters of 1.2 M parameters`."""
    name = resolved.hf.family.model_type
    if resolved.model.adapters is None:
        return name
    trained = _count(resolved.model.adapters, resolved.model.adapters.table)
    return f"{name} with adapters of {trained / 1e6:,.3g} M parameters"


def _count(tables: Tables, names: Collection[str], share_of_experts: Fraction = Fraction(1)) -> int:
    """Return the number of elements of the named native parameters, of those of experts a share."""
    total = Fraction(0)
    for name, row in tables.table.items():
        if name in names and not is_untrained(name):
            share = share_of_experts if EXPERTS in name else 1
            total += prod(row.op.native_shape(tables.axis_sizes)) * share
    return int(total)


def num_active_params(resolved: ResolvedRun, num_params: int) -> int:
    """Return how many of a model's parameters one token uses: of the experts in a layer those that it chooses."""
    core, adapters = resolved.hf.core, resolved.model.adapters
    active = num_params - core.num_expert_params_idle
    if adapters is not None:
        active -= _count(adapters, adapters.table) - _count(adapters, adapters.table, core.expert_share)
    return active


def describe_experts(core: ModelConfig, config: EngineConfig, size: int, layout: Layout) -> str:
    """Return text such as `8 in each of 2 layers, 2 per token; ep 2: 4 per rank, 2 copies; balance: aux loss 0.01`.

    It is empty without experts.

    Args:
        core: the model.
        config: coefficients of the losses that balance the experts.
        size: number of ranks that divide the experts of a layer.
        layout: sizes of the axes.
    """
    ranks, texts = layout.world_size // layout.pipeline, []
    for stack in core.stacks.values():
        if stack.moe is not None:
            number, top_k, layers = stack.moe.router.num_experts, stack.moe.router.top_k, len(stack.moe.layers)
            where = f"each of {layers}" if layers == stack.num_layers else f"{layers} of {stack.num_layers}"
            copies = f", {ranks // size} copies" if ranks > size else ""
            divided = f"; ep {size}: {number // size} per rank{copies}" if ranks > 1 else ""
            aux = stack.moe.aux_loss if config.moe_aux_loss is None else config.moe_aux_loss
            used = {"aux loss": aux, "z-loss": config.moe_z_loss, "bias rate": config.moe_bias_rate}
            balance = ", ".join(f"{name} {value:g}" for name, value in used.items() if value) or "none"
            texts.append(f"{number} in {where} layers, {top_k} per token{divided}; balance: {balance}")
    return "; ".join(texts)


def positions_of(data: Dataset) -> int:
    """Return the number of positions of a sample: its inputs, plus its targets if a separate decoder reads them."""
    return data.seq_length + (data.target_length or 0)


def flops_per_position(resolved: ResolvedRun, num_params: int, data: Dataset, length: int | None = None) -> float:
    """Return the average FLOPs of one position; see `model_flops_per_token`. Embedding lookups cost none.

    Args:
        resolved: the run.
        num_params: of its model.
        data: the training data.
        length: of the rows that samples are cut into; None = they are complete.
    """
    core, frozen = resolved.hf.core, resolved.model.frozen
    looked_up = core.num_idle_params - core.num_expert_params_idle
    num_frozen = _count(resolved.hf, frozen, core.expert_share) - (looked_up if EMBEDDING in frozen else 0)
    active = num_active_params(resolved, num_params) - looked_up
    return core.flops_per_position(length or data.seq_length, data.target_length or 0, active, max(0, num_frozen))


def device_peak(resolved: ResolvedRun, device: torch.device) -> float | None:
    """Return the peak FLOP/s of a rank's device in the run's precision; None = unknown."""
    if device.type != "cuda":
        return None
    precision = resolved.plan.summary.precision
    return peak_flops(torch.cuda.get_device_name(device), precision, tf32=resolved.run.train.tf32)


def _describe_device(resolved: ResolvedRun, device: torch.device) -> str:
    if device.type == "cuda":
        name, precision = torch.cuda.get_device_name(device), resolved.plan.summary.precision
        return describe_gpu(name, precision, device_peak(resolved, device))
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''} per rank)"


def describe_gpu(name: str, precision: str, peak: float | None) -> str:
    """Return a GPU's name with its peak FLOP/s in a precision; without it the run's metrics have no MFU."""
    if peak is None:
        return f"{name} (no MFU: its peak in {precision} is unknown)"
    return f"{name} (peak {peak / 1e12:,.0f} TFLOP/s in {precision})"
