"""Traces against runs with real tensors on a CPU: memory byte for byte, every operation, and bytes on the wire.

On ranks a thread of gloo may hold a message a while after it has arrived: its memory is free later then, and autograd
copies a parameter's gradient that it holds.

A trace knows no layer but its own. So these differ between both: the loss and its first gradient, two fp32 numbers; and
parameters that several layers share, whose gradients autograd adds up, so that the first of them waits for the second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ds.config import ContextPlan
from megatron_ds.hf.config import read_model
from megatron_ds.layers.moe.router import Router
from megatron_ds.models.config import ModelConfig
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.planner.operations import Attention, Stream
from megatron_ds.planner.trace import TraceSetting, trace_layers
from tests.layers.tiles import set_queries_of_a_tile
from tests.parity.reference import ALL_CONFIGS
from tests.planner.trace.real_runs import Run, choose_evenly, composed, measured
from tests.ranks import run_alone, run_grid

SETTING = TraceSetting(seq_length=32, micro_batch_size=3, device_type="cpu", precision="fp32")
LOSS_BYTES = 8
HELD_BYTES = 4 * 32 * 4 * 32  # of hidden states
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "bf16": ("llama", {"precision": "bf16"}),
    "full": ("llama", {"recompute": "full"}),
    "selective": ("llama", {"recompute": "selective"}),
    "keep-attention": ("llama", {"recompute": "full", "keep_attention": True}),
    "tiles": ("llama", {"mlp_tile_tokens": 32}),
    "frozen": ("llama", {"frozen": frozenset({"embedding.weight", "blocks.0.mlp.up.weight"})}),
    "window": ("mistral", {}),
    "untied-gpt2": ("gpt2-untied", {}),
    "padded": ("llama", {"columns": ("attention_mask",)}),
    "experts": ("qwen3_moe-renormalised", {}),
    "few-labels": ("llama", {"labelled": 0.25}),
}


def model(case: str) -> ModelConfig:
    return read_model(dict(ALL_CONFIGS[case])).core


def check(found: Run, real: Run, held_bytes: int = 0) -> None:
    """Compare a trace with a run.

    Args:
        found, real: both.
        held_bytes: the most that the run may hold longer.
    """
    assert 0 <= real.kept - found.kept <= held_bytes
    assert 0 <= real.forward_peak - found.forward_peak <= held_bytes
    assert 0 <= real.backward_peak - found.backward_peak <= LOSS_BYTES + held_bytes
    assert found.sent == real.sent
    assert found.forward == real.forward
    more = real.backward - found.backward
    assert more.pop(Stream(4, name="zero_")) == 1
    assert not found.backward - real.backward
    assert all(held_bytes and isinstance(one, Stream) and one.name == "copy_" for one in more), more


def sampled(cases: Iterable[str], *often: str) -> list[Any]:
    """Return the cases as parameters, of which `make test` runs those that are named."""
    return [case if case in often else pytest.param(case, marks=pytest.mark.sweep) for case in cases]


@pytest.mark.parametrize("case", sampled(ALONE, "plain", "bf16", "keep-attention", "tiles", "experts", "few-labels"))
def test_a_model_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options = ALONE[case]
    monkeypatch.setattr(Router, "_choose", choose_evenly)
    core, setting = model(name), replace(SETTING, **options)
    check(composed(trace_layers(core.build_layers, setting)), run_alone(measured, core, setting))


def test_a_window_in_tiles_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    set_queries_of_a_tile(monkeypatch, 8)
    core = model("mistral")
    found = composed(trace_layers(core.build_layers, SETTING))
    tiles = {(one.queries, one.keys) for one in found.forward if isinstance(one, Attention)}
    assert max(keys for _, keys in tiles) == 8 + 7 - 1, "of a window of 7"
    check(found, run_alone(measured, core, SETTING))


RANKS: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "tensor": ("llama", Layout(tensor=2), {"tensor": 2}),
    "sequence": ("llama", Layout(tensor=2), {"tensor": 2, "sequence": True}),
    "sequence-full": ("llama", Layout(tensor=2), {"tensor": 2, "sequence": True, "recompute": "full"}),
    "two-key-heads": ("qwen2-2kv", Layout(tensor=4), {"tensor": 4}),
    "ring": ("llama", Layout(context=2), {"context": ContextPlan(1, 2, "ring", zigzag=True)}),
    "gather": ("llama", Layout(context=2), {"context": ContextPlan(1, 2, "gather", zigzag=True)}),
    "ulysses": ("llama", Layout(context=2), {"context": ContextPlan(2, 1)}),
    "both": ("llama", Layout(context=4), {"context": ContextPlan(2, 2, "ring", zigzag=True)}),
    "experts": ("qwen3_moe-renormalised", Layout(tensor=2), {"tensor": 2}),
    "experts-sequence": ("qwen3_moe-renormalised", Layout(tensor=2), {"tensor": 2, "sequence": True}),
    "experts-of-data": ("qwen3_moe-renormalised", Layout(data=2), {"expert": 2}),
}


def on_rank(grid: Grid, core: ModelConfig, setting: TraceSetting) -> tuple[Run, Run, int]:
    """Return the trace of this rank, made while its process group is live, the run, and the world's size after both."""
    own = replace(setting, tensor_rank=grid.tensor.rank, context_rank=grid.context.rank)
    found = composed(trace_layers(core.build_layers, own))
    real = measured(core, setting, grid)
    return found, real, dist.get_world_size()


@pytest.mark.parametrize("case", sampled(RANKS, "sequence-full", "both", "experts-of-data"))
def test_a_model_on_ranks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, layout, options = RANKS[case]
    monkeypatch.setattr(Router, "_choose", choose_evenly)
    setting = replace(SETTING, micro_batch_size=4, **options)
    ulysses = setting.context.ulysses if setting.context.size > 1 else None
    results = run_grid(on_rank, layout, model(name), setting, expert=setting.expert, ulysses=ulysses)
    for found, real, size in results:
        check(found, real, held_bytes=HELD_BYTES)
        assert size == layout.world_size
