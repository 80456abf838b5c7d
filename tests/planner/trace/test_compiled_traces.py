"""Traces of compiled blocks against the kernels that torch.compile schedules; what such a trace leaves as it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from megatron_ds.config import ContextPlan
from megatron_ds.models.block import Block
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import HIDDEN
from megatron_ds.planner.operations import Attention, LayerTrace, Product, Stream, Work
from megatron_ds.planner.trace import TraceSetting, trace_layers
from megatron_ds.runtime import load_model
from tests.planner.memory_cases import MODELS
from tests.ranks import run_alone

SETTING = TraceSetting(seq_length=128, micro_batch_size=2, device_type="cpu", compile=True)


def trace(model: str, setting: TraceSetting) -> LayerTrace:
    traces = trace_layers(load_model(dict(MODELS[model])).layers, setting)
    return next(one for one in traces if one.is_block)


def streamed(work: Work) -> int:
    return sum(one.num_bytes * count for one, count in work.items() if isinstance(one, Stream))


def scheduled_bytes(model: str) -> list[int]:
    """Bytes that Inductor's fused kernels of a block read and write, forward and backward, as its scheduler counts."""
    from torch._inductor.compile_fx import (
        _recursive_post_grad_passes,
        compile_fx,
        fake_tensor_prop,
        record_original_output_strides,
    )
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.virtualized import V

    found = []

    def count(module: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        with V.set_fake_mode(fake_tensor_prop(module, inputs)):
            record_original_output_strides(module)
            _recursive_post_grad_passes(module, is_inference=False)
            graph = GraphLowering(module, example_inputs=inputs)
            with DebugContext(), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*inputs)
                graph._update_scheduler()
                fused = (one for one in graph.scheduler.nodes if not isinstance(one, ExternKernelSchedulerNode))
                found.append(sum(one.get_read_write_buffers_sizes() for one in fused))

        def run(given: list[Any]) -> Any:
            return module.forward(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    torch.set_default_dtype(torch.bfloat16)
    specs = load_model(dict(MODELS[model])).layers(
        BuildContext(compiled=True, compiler=partial(compile_fx, inner_compile=count))
    )
    block = next(spec for spec in specs if spec.is_block).build()
    assert isinstance(block, Block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.02)
    x: Tensor = torch.randn(128, 2, 128, requires_grad=True)
    block({HIDDEN: x})[HIDDEN].sum().backward()
    assert len(found) == 2, found
    return found


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.sweep)])
def test_streams_are_the_bytes_of_fused_kernels(model: str) -> None:
    block, expected = run_alone(trace, model, SETTING), run_alone(scheduled_bytes, model)
    found = [streamed(block.forward), streamed(block.backward)]
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs, rel=0.1), (found, expected)


def test_a_compiler_changes_streams_alone() -> None:
    """A block on one rank is one graph, of which the products and attention stay what they are."""

    def computed(work: Work) -> set[Any]:
        return {(one, count) for one, count in work.items() if isinstance(one, Product | Attention)}

    eager, compiled = (run_alone(trace, "llama", replace(SETTING, compile=one)) for one in (False, True))
    assert computed(compiled.forward) == computed(eager.forward)
    assert compiled.backward.flops == eager.backward.flops
    assert streamed(compiled.backward) < 0.9 * streamed(eager.backward)
    assert compiled.output_bytes == eager.output_bytes and compiled.grad_input_bytes == eager.grad_input_bytes


def test_kernels_of_a_gpu_are_fused_already() -> None:
    setting = replace(SETTING, device_type="cuda")
    eager, compiled = (run_alone(trace, "llama", replace(setting, compile=one)) for one in (False, True))
    both = streamed(eager.forward) + streamed(eager.backward), streamed(compiled.forward) + streamed(compiled.backward)
    assert 0.7 * both[0] < both[1] < 1.2 * both[0], both


def leaves_nothing() -> float:
    trace("llama", SETTING)
    with patch.object(torch._dynamo.config, "recompile_limit", 8):
        begun_s = time.process_time()
        trace("llama", replace(SETTING, micro_batch_size=3))
        spent_s = time.process_time() - begun_s
    calls = []

    @torch.compile(backend=lambda graph, inputs: calls.append(graph) or graph.forward)
    def double(x: Tensor) -> Tensor:
        return 2 * x

    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0)) and len(calls) == 1
    assert type(torch.ones(2) + 1) is Tensor
    return spent_s


def test_nothing_of_the_process_is_changed() -> None:
    """And the second trace, when torch is imported, takes a few seconds at most; the bound is loose."""
    assert run_alone(leaves_nothing) < 6.0


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("llama", {"tensor": 2, "sequence": True}),
        pytest.param("llama", {"tensor": 2}, marks=pytest.mark.sweep),
        pytest.param("mixtral", {"tensor": 2, "expert": 4, "sequence": True}, marks=pytest.mark.sweep),
        pytest.param("llama", {"context": ContextPlan(ulysses=2)}, marks=pytest.mark.sweep),
    ],
)
def test_compiled_blocks_on_gpus_send_what_others_do(model: str, place: dict[str, Any]) -> None:
    """Sums of gradients of norms are in the middle of what a graph would be."""
    setting = replace(SETTING, device_type="cuda", compile=False, **place)
    plain, compiled = (run_alone(trace, model, replace(setting, compile=compile)) for compile in (False, True))
    for before, after in ((plain.forward, compiled.forward), (plain.backward, compiled.backward)):
        assert before.sent_bytes == after.sent_bytes and before.flops == after.flops
    assert plain.backward.sent_bytes
