"""Traces as other systems compute them, against formulas of the papers."""

from dataclasses import replace

import pytest

from megatron_ds.planner.operations import Attention, Collective, LayerTrace, Product, Stream, Work
from megatron_ds.planner.profiles import find_device
from megatron_ds.planner.timing.systems import (
    FP8,
    System,
    apply,
    attention_speed,
    gathered,
    gradient_work,
    update_work,
)

B, S, HEADS, D = 2, 1024, 8, 64
HIDDEN = HEADS * D
ATTENTION = Attention(B, HEADS, HEADS, D, S, S, pairs=S * (S + 1) // 2)
LINEAR, DGRAD, WGRAD = Product(B * S, 4096, HIDDEN), Product(B * S, HIDDEN, 4096), Product(4096, HIDDEN, B * S)
SUM = Collective("all_reduce", "tensor", 8 << 20, 8)
BLOCK = LayerTrace(
    "blocks.0",
    True,
    Work({ATTENTION: 1, LINEAR: 1, SUM: 1, Stream(100): 1}),
    Work({replace(ATTENTION, backward=True): 1, DGRAD: 1, WGRAD: 1, replace(SUM, hidden=True): 1}),
    *(0, 0, 0, 0, 0),
)
UNFUSED = System("old", attention="unfused", drops_scores=True)


def streamed(work: Work) -> int:
    return sum(one.num_bytes * count for one, count in work.items() if isinstance(one, Stream))


def test_unfused_attention_computes_all_pairs() -> None:
    """4 B S^2 h FLOPs forward and twice as many backward (Narayanan et al. 2021, appendix)."""
    found = apply(UNFUSED, BLOCK)
    assert not any(isinstance(one, Attention) for one in found.forward + found.backward)
    assert found.forward.flops - LINEAR.flops == 4 * B * S * S * HIDDEN
    assert found.backward.flops - DGRAD.flops - WGRAD.flops == 8 * B * S * S * HIDDEN


def test_scores_go_through_memory() -> None:
    """Softmax reads and writes 2 bytes a score, dropout 4 and a mask; the heads are copied once."""
    pairs = B * HEADS * S * S
    found = apply(UNFUSED, BLOCK)
    assert streamed(found.forward) == 100 + pairs * (4 + 5) + 4 * B * S * HIDDEN
    assert streamed(found.backward) == pairs * (6 + 5) + 3 * 4 * B * S * HIDDEN
    assert streamed(apply(replace(UNFUSED, drops_scores=False), BLOCK).forward) == 100 + pairs * 4 + 4 * B * S * HIDDEN


def test_recomputation() -> None:
    full, selective = apply(UNFUSED, BLOCK, "full"), apply(UNFUSED, BLOCK, "selective")
    assert full.recompute == full.forward
    assert full.backward == apply(UNFUSED, BLOCK).backward + full.forward
    assert selective.recompute.flops == 4 * B * S * S * HIDDEN
    assert not any(isinstance(one, Collective) for one in selective.recompute)
    fused = System("new")
    assert apply(fused, BLOCK, "selective").recompute == Work()
    half = apply(fused, replace(BLOCK, forward=Work({LINEAR: 4, ATTENTION: 1, Stream(100): 3})), "half").recompute
    assert half == Work({LINEAR: 2, Stream(100): 3})
    head = replace(BLOCK, is_block=False)
    assert apply(UNFUSED, head, "full").recompute == Work()


def test_fp8_products_and_casts() -> None:
    found = apply(System("fp8", fp8=True), BLOCK)
    assert {one.dtype for one in found.forward + found.backward if isinstance(one, Product)} == {FP8}
    assert streamed(found.forward) == 100 + 4 * LINEAR.m * LINEAR.k
    assert streamed(found.backward) == 4 * LINEAR.m * LINEAR.n
    head = apply(System("fp8", fp8=True), replace(BLOCK, is_block=False))
    assert {one.dtype for one in head.forward if isinstance(one, Product)} == {"bfloat16"}


def test_collectives_of_the_tensor_axis() -> None:
    def tensor(system: System) -> list[Collective]:
        found = apply(system, BLOCK)
        return [one for work in (found.forward, found.backward) for one in work if isinstance(one, Collective)]

    assert tensor(System("ours")) == [SUM, replace(SUM, hidden=True)]
    assert tensor(System("none", hides_tensor="none")) == [SUM, SUM]
    assert tensor(System("chunks", hides_tensor="chunks")) == [replace(SUM, num_bytes=SUM.num_bytes // 4)]


def test_gradients() -> None:
    assert gradient_work(System("fused"), 1000) == Work()
    half, full = System("half", fuses_gradients=False, gradient_bytes=2), System("full", fuses_gradients=False)
    assert streamed(gradient_work(half, 1000)) == 1000 * (2 + 2 * 2)
    assert streamed(gradient_work(full, 1000)) == 1000 * (2 + 2 * 4)


def test_sharded_weights_are_gathered_for_each_pass() -> None:
    system = System("fsdp", state="sharded", gradient_bytes=2)
    found = gathered(system, BLOCK, {"shard": (1000, 8)})
    gather = Collective("all_gather", "shard", 2000, 8, hidden=True)
    assert found.forward[gather] == found.backward[gather] == 1
    assert found.backward[Collective("reduce_scatter", "shard", 2000, 8, hidden=True)] == 1
    assert gathered(replace(system, state="distributed"), BLOCK, {"shard": (1000, 8)}) is BLOCK
    assert gathered(system, BLOCK, {"shard": (1000, 1)}).forward == BLOCK.forward


@pytest.mark.parametrize(
    ("state", "kinds", "part"),
    [
        ("replicated", ["all_reduce"], 1),
        ("zero1", ["all_reduce", "all_gather"], 8),
        ("distributed", ["reduce_scatter", "all_gather"], 8),
        ("sharded", [], 8),
    ],
)
def test_end_of_a_step(state: str, kinds: list[str], part: int) -> None:
    sent, update = update_work(System("x", state=state), {"shard": (8000, 8)})  # type: ignore[arg-type]
    assert [one.kind for one in sent if isinstance(one, Collective)] == kinds
    local = 1000 if state == "sharded" else 8000
    assert streamed(update) == 30 * (8000 // part) + 8 * local
    assert update_work(System("x"), {"shard": (8000, 1)})[0] == Work()


def test_speed_of_attention_kernels() -> None:
    a100, h100 = (find_device(name, measured=False) for name in ("a100-80", "h100"))
    assert attention_speed(System("x"), h100) == (1.0, 1.0)
    assert attention_speed(System("x", attention="flash2"), a100) == (1.0, 1.0)
    assert max(attention_speed(System("x", attention="flash2"), h100)) < 1
    assert max(attention_speed(System("x", attention="flash1"), a100)) < 1
