"""Sinks: transformers' formula of gpt-oss, forward and backward, and what a kernel must not get wrong."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as library

from megatron_ds.errors import ConfigError
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.kernels import KERNELS, AttentionCall, Candidate, Kernels, KernelsByCall, flex
from megatron_ds.layers.kernels.by_call import Deferred, Entry
from megatron_ds.layers.kernels.check import validated
from megatron_ds.layers.kernels.reference import reference_attention, reference_mask
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.test_attention import PLAIN

CPU, ATTENTION = torch.device("cpu"), KERNELS["attention"]
SHAPE = replace(PLAIN, head_dim=16, num_kv_heads=2, window=5, sinks=True)
LENGTH, BATCH, HEADS = 12, 2, SHAPE.num_heads
LEFT_PADDED = torch.ones(BATCH, LENGTH, dtype=torch.uint8)
LEFT_PADDED[0, :4] = 0


def layer_of(dtype: torch.dtype = torch.float32, recompute: str = "none", kernels: Any = None) -> Attention:
    layer = Attention(SHAPE, TensorParallel(), None, Recompute(recompute), None, Kernels(attention=kernels))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in layer.parameters():
            one.copy_(torch.randn(one.shape, generator=generator))
    return layer.to(dtype)


def drawn(dtype: torch.dtype, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(length, BATCH, heads, SHAPE.head_dim, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    ]


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, direction)]


def by_transformers(tensors: list[Tensor], sinks: Tensor, key_mask: Tensor) -> Tensor:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = nn.Module()
    module.num_key_value_groups, module.sinks = HEADS // SHAPE.num_kv_heads, sinks  # type: ignore[assignment]
    seen = reference_mask(LENGTH, AttentionCall(1.0, SHAPE.window, key_mask=key_mask), CPU)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(tensors[0].dtype).min).to(tensors[0].dtype)
    y, _ = eager_attention_forward(module, *(one.permute(1, 2, 0, 3) for one in tensors), mask, SHAPE.scale)
    return y.transpose(0, 1).flatten(2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_equals_transformers(dtype: torch.dtype, tolerance: float) -> None:
    """In bf16 transformers' softmax is rounded to bf16, and ours is not."""
    layer, tensors = layer_of(dtype), drawn(dtype)
    assert layer.sinks is not None
    leaves = [*tensors, layer.sinks]
    found = with_gradients(layer._core(*tensors, LEFT_PADDED), leaves)
    expected = with_gradients(by_transformers(tensors, layer.sinks, LEFT_PADDED), leaves)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).float().norm()) <= tolerance * float(other.float().norm())
    assert not found[0][:4, 0].any(), "queries that see no key"


def test_recomputed_gradients_are_the_same() -> None:
    def run(recompute: str) -> list[Tensor]:
        layer = layer_of(recompute=recompute)
        x = torch.randn(LENGTH, BATCH, SHAPE.hidden_size, generator=torch.Generator().manual_seed(4)).requires_grad_()
        return with_gradients(layer(x, LEFT_PADDED), [x, *layer.parameters()])

    assert all(torch.equal(one, other) for one, other in zip(run("selective"), run("none"), strict=True))


def test_torch_compile_traces_the_formula() -> None:
    layer, tensors = layer_of(), drawn(torch.float32)
    assert layer.sinks is not None
    core = torch.compile(layer._core, backend="aot_eager", dynamic=False, fullgraph=True)
    found, expected = (
        with_gradients(run(*tensors, LEFT_PADDED), [*tensors, layer.sinks]) for run in (core, layer._core)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_layers_share_a_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sinks are a parameter of each layer: other values, the same graph."""
    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)  # refuses gradients on a CPU
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph

    attend = torch.compile(flex.attend, backend=count, dynamic=False, fullgraph=True)
    kernel = flex.FlexAttention(attend, flex.KeptMasks())
    made = Deferred(lambda *arguments: ATTENTION.variant(*arguments), lambda *arguments: kernel)  # type: ignore[misc]
    entry = Entry("flex", flex.supports, made)
    for seed in range(2):
        layer, tensors = layer_of(torch.bfloat16, kernels=KernelsByCall([entry])), drawn(torch.bfloat16, 150)
        assert layer.sinks is not None
        with torch.no_grad():
            layer.sinks += seed
        leaves = [*tensors, layer.sinks]
        found = with_gradients(layer._core(*tensors, None), leaves)
        call = AttentionCall(SHAPE.scale, SHAPE.window, sinks=layer.sinks)
        expected = with_gradients(reference_attention(*tensors, call).flatten(2), leaves)
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).float().norm()) <= 2e-2 * float(other.float().norm())
    assert len(graphs) == 1


@pytest.mark.parametrize("wrong", ["left out", "without their gradient"])
def test_a_kernel_that_only_claims_sinks_is_refused(wrong: str) -> None:
    def claimed(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        assert call.sinks is not None
        sinks = call.sinks.detach() + 0 * call.sinks if wrong == "without their gradient" else None
        return reference_attention(q, k, v, replace(call, sinks=sinks)) + 0 * call.sinks.sum()

    def supports(*arguments: Any) -> bool:
        return arguments[3].sinks is not None

    right = Candidate("torch", lambda: reference_attention, "torch", ("cpu",), supports)
    assert validated(ATTENTION, right, CPU) is reference_attention
    with pytest.raises(ConfigError, match="attention: differs from PyTorch by"):
        validated(ATTENTION, replace(right, make=lambda: claimed), CPU)


def test_sinks_start_small_and_do_not_decay() -> None:
    sinks = Attention(replace(SHAPE, kv_std=0.02), TensorParallel(), None, Recompute(), None).sinks
    assert sinks is not None and sinks.shape == (HEADS,)
    spec = spec_of(sinks)
    assert spec.std is not None and math.isclose(spec.std, 0.02) and not spec.decay
