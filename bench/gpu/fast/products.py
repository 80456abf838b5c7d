"""The ceiling: plain matrix products in bf16, of the shapes that the models have."""

from __future__ import annotations

import torch

from bench.gpu.fast.measure import CEILING
from bench.gpu.fast.models import BLOCKS, LLAMA
from bench.gpu.record import guarded, pick, record, time_runs, torch_device, wait_for_turn
from bench.work import Work

SQUARE = pick(8192, 64)


def layer_shapes(work: Work) -> dict[str, tuple[int, int]]:
    """Return (output, input) widths of the projections of a Llama's layer."""
    model = work.model
    hidden, ffn, heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    head_dim = hidden // heads
    kv = model["num_key_value_heads"] * head_dim
    return {
        "queries": (heads * head_dim, hidden),
        "keys and values": (2 * kv, hidden),
        "attention output": (hidden, heads * head_dim),
        "gate and up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }


def main() -> None:
    """Record the speed of each product: forward, input gradient and weight gradient; and the ceiling of all."""
    device, fastest = torch_device(), 0.0
    cases = {f"{SQUARE} x {SQUARE} x {SQUARE}": (SQUARE, SQUARE, SQUARE)}
    for label, work in (("1.2 B", LLAMA), ("8 B", BLOCKS)):
        cases |= {f"{label}: {name}": (work.tokens, *shape) for name, shape in layer_shapes(work).items()}
    cases["8 B: head, 4,096 tokens"] = (pick(4096, 64), BLOCKS.model["vocab_size"], BLOCKS.model["hidden_size"])
    for name, (tokens, wide, inner) in cases.items():
        x, w, g = (
            torch.randn(shape, device=device, dtype=torch.bfloat16)
            for shape in ((tokens, inner), (wide, inner), (tokens, wide))
        )
        tera = 2.0 * tokens * wide * inner / 1e12
        three = (lambda: x @ w.t(), lambda: g @ w, lambda: g.t() @ x)  # noqa: B023
        speeds = [round(tera / time_runs(one, times=pick(20, 2), budget_s=0.2).median_s, 1) for one in three]
        fastest = max(fastest, *speeds)
        rows = dict(zip(("forward", "input_gradient", "weight_gradient"), speeds))
        record(CEILING.section, name, None, tokens=tokens, **rows)
    record(CEILING.section, CEILING.name, None, **{CEILING.key: fastest})


if __name__ == "__main__":
    wait_for_turn()
    guarded(CEILING.section, CEILING.name, main)
