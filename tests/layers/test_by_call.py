"""Which kernel computes the attention of which family, and when a kernel is made and checked."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as library

from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import read_model
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.attention_masks import Row
from megatron_ds.layers.kernels import KERNELS, AttentionCall, Candidate, Kernels, KernelsByCall, Operation, flex
from megatron_ds.layers.kernels.by_call import Deferred, Entry
from megatron_ds.layers.kernels.reference import reference_attention
from megatron_ds.layers.kernels.select import select_kernels
from megatron_ds.layers.recompute import Recompute
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.test_attention import PLAIN
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.reference import ALL_CONFIGS

CPU, META = torch.device("cpu"), torch.device("meta")
ATTENTION = KERNELS["attention"]
FROM_TORCH = {name: one for name, one in ATTENTION.items() if one.package == "torch"}


def by_name(names: list[str]) -> KernelsByCall:
    """Kernels that give their candidate's name instead of attention."""

    def entry(name: str) -> Entry:
        supports = ATTENTION[name].supports or ATTENTION.supports
        assert supports is not None
        return Entry(name, supports, lambda *arguments: lambda *arguments: name)

    return KernelsByCall([entry(name) for name in names])


def chosen(layer: Attention, length: int, **given: Tensor | None) -> str | None:
    """The name of the candidate that computes a layer's self-attention in bf16."""
    shape = layer.shape
    q = torch.empty(length, 2, shape.num_heads, shape.head_dim, dtype=torch.bfloat16, device=META)
    kv = torch.empty(length, 2, shape.num_kv_heads, shape.head_dim, dtype=torch.bfloat16, device=META)
    distances = layer.relative(length) if layer.relative is not None else None
    row = Row(given.get("key_mask"), given.get("positions"), given.get("bounds"), distances)
    call = layer._call(q, row)
    kernel = layer._kernel(q, kv, kv, call)
    return None if kernel is None else str(kernel(q, kv, kv, call))


def layers_of(case: str, kernels: KernelsByCall) -> list[Attention]:
    """The layers of a family, at heads of 64 features and with windows of 128."""
    stacks: Any = read_model(ALL_CONFIGS[case]).core.stacks.values()
    shapes = [stack.attention(layer) for stack in stacks for layer in range(stack.num_layers)]
    with META:
        return [
            Attention(
                replace(one, head_dim=64, window=None if one.window is None else 128, dropout=0.0),
                *(TensorParallel(), None, Recompute(), None, Kernels(attention=kernels)),
            )
            for one in shapes
        ]


# unpacked, packed: without flash-attn, and with it
CHOICES: dict[str, tuple[set[str | None], ...]] = {
    "llama": ({None}, {"varlen"}, {"flash"}, {"flash"}),
    "gpt2": ({None}, {"varlen"}, {"flash"}, {"flash"}),
    "mistral-window": ({"varlen"}, {"varlen"}, {"flash"}, {"flash"}),
    "gemma2-caps": ({"flex"}, {"flex"}, {"flash"}, {"flash"}),
    "bloom-tied": ({"flex"}, {"flex"}, {"flex"}, {"flex"}),
    "falcon-7b-alibi": ({"flex"}, {"flex"}, {"flex"}, {"flex"}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_kernel_of_a_family(case: str) -> None:
    positions = torch.empty(2, 4096, dtype=torch.int64, device=META)
    for at, names in ((0, ["varlen", "flex"]), (2, ["flash", "varlen", "flex"])):
        layers = layers_of(case, by_name(names))
        assert {chosen(layer, 4096) for layer in layers} == CHOICES[case][at]
        assert {chosen(layer, 4096, positions=positions) for layer in layers} == CHOICES[case][at + 1]


@pytest.mark.parametrize("case", [case for case in ("t5-gated", "bert-pretraining") if case in ENCODER_CASES])
def test_the_kernel_of_an_encoder(case: str) -> None:
    """A learned bias of many pairs; a mask of keys alone is small, and a bias of few pairs is faster as a tensor."""
    for layer in layers_of(case, by_name(["varlen", "flex"])):
        key_mask = torch.empty(2, 4096, dtype=torch.uint8, device=META)
        assert chosen(layer, 4096, key_mask=key_mask) == ("flex" if layer.relative is not None else None)
        assert chosen(layer, 512, key_mask=key_mask[:, :512]) is None


def test_a_release_that_does_not_cap_is_passed_over() -> None:
    shape = replace(PLAIN, head_dim=64, softcap=30.0)
    names = by_name(["flash4", "flash", "varlen"])
    with META:
        capped, plain = (
            Attention(one, TensorParallel(), None, Recompute(), None, Kernels(attention=names))
            for one in (shape, replace(shape, softcap=None))
        )
    assert (chosen(capped, 256), chosen(plain, 256)) == ("flash", "flash4")


def test_sinks_are_computed_by_what_returns_the_log_sum_exp() -> None:
    names = by_name(["flash3", "flash4", "flash", "varlen", "flex"])
    positions = torch.empty(2, 4096, dtype=torch.int64, device=META)
    for window in (None, 128):
        with META:
            shape = replace(PLAIN, head_dim=64, window=window, sinks=True)
            layer = Attention(shape, TensorParallel(), None, Recompute(), None, Kernels(attention=names))
        assert chosen(layer, 4096) == chosen(layer, 4096, positions=positions) == "flex"
        assert chosen(layer, 64) is None, "few pairs"


@pytest.mark.parametrize(
    "change",
    [{"head_dim": 12}, {"head_dim": 260}, {"dropout": 0.1, "softcap": 1.0}],
    ids=str,
)
def test_what_no_kernel_computes_is_left_to_the_layer(change: dict[str, Any]) -> None:
    with META:
        shape = replace(PLAIN, **{"head_dim": 64, "window": 64, **change})
        layer = Attention(shape, TensorParallel(), None, Recompute(), None, Kernels(attention=by_name(["varlen"])))
    assert chosen(layer, 256) is None


def test_a_kernel_from_outside_computes_plain_calls() -> None:
    """A candidate that says nothing is asked for what it was always asked for."""

    def mine(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        assert call.is_plain
        return reference_attention(q, k, v, call).to(q.dtype)

    operation = Operation("attention", reference_attention, ATTENTION.examples, supports=ATTENTION.supports)
    operation.register("mine", Candidate("torch", lambda: mine, devices=("cpu",)))
    found = select_kernels("auto", CPU, {"attention": operation}).attention
    assert found is mine
    with META:
        layer = Attention(
            replace(PLAIN, causal=False), TensorParallel(), None, Recompute(), None, Kernels(attention=mine)
        )
    q = torch.empty(8, 1, 4, 16, dtype=torch.bfloat16, device=META)
    assert layer._kernel(q, q, q, layer._call(q, Row())) is None
    assert layer._kernel(q, q, q, AttentionCall(1.0)) is mine


def deferred(kernel: Any) -> tuple[KernelsByCall, list[int]]:
    made: list[int] = []

    def make() -> Any:
        made.append(1)
        return kernel

    variants = ATTENTION.variant, ATTENTION.smaller
    operation = Operation("attention", reference_attention, ATTENTION.examples, True, ATTENTION.supports, *variants)
    one = Candidate(
        "torch", make, devices=("cpu",), supports=lambda q, k, v, call: call.softcap is not None, deferred=True
    )
    operation.register("late", one)
    found = select_kernels({"attention": "late"}, CPU, {"attention": operation}).attention
    assert isinstance(found, KernelsByCall)
    return found, made


def test_a_deferred_kernel_is_checked_at_its_first_call() -> None:
    found, made = deferred(reference_attention)
    q = torch.randn(8, 1, 4, 16)
    assert found.find(q, q, q, AttentionCall(1.0)) is None and not made
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda one: 1 / 0, lambda one: one):
        assert found.find(q, q, q, AttentionCall(1.0, softcap=2.0)) is reference_attention
    found.find(q, q, q, AttentionCall(0.5, softcap=3.0))
    assert len(made) == 1
    found.find(q, q, q, AttentionCall(0.5, softcap=3.0, key_bias=torch.randn(1, 4, 8)))
    assert len(made) == 2

    def uncapped(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        return reference_attention(q, k, v, replace(call, softcap=None))

    wrong, _ = deferred(uncapped)
    with pytest.raises(ConfigError, match=r"train.kernels.attention=late: torch, attention: differs from PyTorch by"):
        wrong.find(q, q, q, AttentionCall(1.0, softcap=0.1))


def test_torch_alone_has_a_kernel_for_all_but_plain_attention() -> None:
    assert list(FROM_TORCH) == ["varlen", "flex"] == list(ATTENTION.names[-2:])
    assert FROM_TORCH["flex"].deferred and all(one.is_installed for one in FROM_TORCH.values())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_torch_compile_traces_the_choice(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, mask by blocks included, once the kernel has been checked."""
    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)  # refuses gradients on a CPU
    flexible = Entry("flex", flex.supports, Deferred(ATTENTION.variant, lambda *arguments: flex.flex_attention()))
    shape = replace(PLAIN, head_dim=16, softcap=softcap, window=100)
    kernels = Kernels(attention=KernelsByCall([flexible]))
    layer = Attention(shape, TensorParallel(), None, Recompute(), None, kernels)
    positions = torch.arange(200).remainder(90)[None]
    bounds = torch.tensor([[0, 90, 180, 200, 200]], dtype=torch.int32)
    torch.manual_seed(0)
    tensors = [torch.randn(200, 1, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    layer.prepare(tensors[0], None, positions)
    core = torch.compile(layer._core, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(layer, "_by_torch", lambda *given: 1 / 0)
    found = core(*tensors, None, positions, bounds)
    expected = reference_attention(*tensors, AttentionCall(0.6, 100, softcap, positions)).flatten(2)
    for one, other in zip((found, *_grads(found, tensors)), (expected, *_grads(expected, tensors)), strict=True):
        assert float((one - other).detach().norm()) <= 2e-2 * float(other.detach().norm())


def _grads(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, tensors, torch.ones_like(y))
