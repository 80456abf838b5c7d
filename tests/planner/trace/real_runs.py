"""A model's forward and backward pass with real tensors on a CPU, measured as a trace is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from megatron_ds.columns import find_column
from megatron_ds.dtypes import DTYPE_OF_PRECISION
from megatron_ds.layers.moe.router import Router
from megatron_ds.layers.recompute import BLOCKS, BLOCKS_WITHOUT_ATTENTION, Recompute
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import HeadSpec, SequentialModel, head_of
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Grid
from megatron_ds.parallel.tensor import TensorParallel
from megatron_ds.planner.operations import Collective, LayerTrace, Message, Work
from megatron_ds.planner.trace import TraceSetting
from megatron_ds.planner.trace.recorder import Recorder
from tests.parallel.wire_bytes import counting


@dataclass(frozen=True)
class Run:
    """One forward and one backward pass of all layers.

    Attributes:
        kept: bytes that are live after the forward pass.
        forward_peak, backward_peak: the most in each; a parameter's gradient counts until it is complete.
        forward, backward: operations on the device.
        sent: bytes that the rank has sent.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    forward: Work
    backward: Work
    sent: Fraction


def composed(traces: list[LayerTrace]) -> Run:
    """Return the run that the traces of a model's layers stand for."""
    live, forward_peak, before = 0, 0, []
    for trace in traces:
        before.append(live)
        forward_peak = max(forward_peak, live + trace.forward_peak_bytes)
        live += trace.kept_bytes - trace.released_bytes
    backward_peak = max(
        base - trace.released_bytes + moment.peak_bytes
        for base, trace in zip(before, traces)
        for moment in trace.in_backward
    )
    forward, backward = Work(), Work()
    for trace in traces:
        forward, backward = forward + trace.forward, backward + trace.backward
    sent = sum((*forward.sent_bytes.values(), *backward.sent_bytes.values()), Fraction(0))
    return Run(live, forward_peak, backward_peak, _on_device(forward), _on_device(backward), sent)


def _on_device(work: Work) -> Work:
    return Work({one: count for one, count in work.items() if not isinstance(one, Collective | Message)})


def measured(core: ModelConfig, setting: TraceSetting, grid: Grid | None = None) -> Run:
    """Return a run after one that makes what layers keep, with the least memory of three: see `test_against_runs`."""
    ctx = _context(setting, grid)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE_OF_PRECISION[setting.precision])
    try:
        specs = core.build_layers(ctx)
        model = SequentialModel(specs)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_(name not in setting.frozen)
    head = head_of(specs)
    batch = _batch(specs[0].columns, head, setting, ctx.tp.context)
    _step(model, batch, head)
    runs = [_step(model, batch, head) for _ in range(3)]
    least = {name: min(getattr(run, name) for run in runs) for name in ("kept", "forward_peak", "backward_peak")}
    return replace(runs[-1], **least)


def _context(setting: TraceSetting, grid: Grid | None) -> BuildContext:
    checkpoint = BLOCKS_WITHOUT_ATTENTION if setting.keep_attention else BLOCKS
    recompute = Recompute() if setting.recompute == "none" else Recompute(setting.recompute, checkpoint)
    if grid is None:
        return BuildContext(recompute=recompute, mlp_tile_tokens=setting.mlp_tile_tokens)
    plan = setting.context
    context = ContextParallel(grid.context, grid.ulysses, grid.ring, plan.method, plan.zigzag)
    tp = TensorParallel(grid.tensor, setting.sequence, context=context)
    return BuildContext(tp, recompute=recompute, experts=ExpertParallel(grid.expert, tp))


def _batch(
    columns: tuple[str, ...], head: HeadSpec, setting: TraceSetting, context: ContextParallel
) -> dict[str, Tensor]:
    """Return a micro-batch whose first positions carry loss, as many as the setting says."""
    found = {}
    for name in (*columns, *head.label_columns):
        if name in head.label_columns or name.endswith("input_ids") or name in setting.columns:
            column = find_column(name)
            shape = column.shape(setting.seq_length, setting.target_length, setting.num_labels)
            dtype = torch.uint8 if column.dtype == "bool" else getattr(torch, column.dtype)  # as masks enter a model
            found[name] = torch.ones(setting.micro_batch_size, *shape, dtype=dtype)
            if name in head.label_columns and column.has_positions and setting.labelled < 1.0:
                found[name][:, round(setting.labelled * shape[0]) :] = column.ignored
    return head.with_own_labels(found, context)


def _step(model: SequentialModel, batch: dict[str, Tensor], head: HeadSpec) -> Run:
    recorder, arrived = Recorder(), list[tuple[int, int, int]]()

    def take(parameter: Tensor) -> None:
        if parameter.grad is not None:
            serial = recorder.serial_of(parameter.grad)
            assert serial is not None
            arrived.append((serial, parameter.grad.nbytes, len(recorder.changes)))
            parameter.grad = None

    hooks = [one.register_post_accumulate_grad_hook(take) for one in model.parameters() if one.requires_grad]
    with counting() as wire, recorder:
        recorder.begin_pass()
        packed = model(batch, head.labels_in(batch))
        kept, forward_peak, forward = recorder.live_bytes, recorder.peak_bytes, recorder.work
        recorder.begin_pass()
        loss = head.scaled_loss(packed, [1.0] * len(head.terms))
        del packed
        loss.backward()
    for hook in hooks:
        hook.remove()
    live, begin, peaks, handed = kept, 0, [kept], set[int | None]()
    for serial, num_bytes, end in arrived:
        peak, change = recorder.peak_without(handed, begin, end)
        peaks.append(live + peak)
        live, begin = live + change - num_bytes, end
        handed.add(serial)
    peaks.append(live + recorder.peak_without(handed, begin)[0])
    return Run(kept, forward_peak, max(peaks), forward, recorder.work, wire.total)


def choose_evenly(router: Router, scores: Tensor) -> Tensor:
    """Return experts of each token so that all are chosen alike, in place of `Router._choose`."""
    tokens, top_k, experts = len(scores), router.shape.top_k, router.shape.num_experts
    return (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
