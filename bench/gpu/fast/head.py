"""The output head and its loss, forward and backward, at a vocabulary of 128,256, and its three products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.gpu.fast.measure import measure_runs
from bench.gpu.fast.models import BLOCKS, LLAMA
from bench.gpu.fast.profile import profile
from bench.gpu.fast.targets import HEAD, OURS, PRODUCTS, SMALL_HEAD
from bench.gpu.fast.weights import STD
from bench.gpu.record import guarded, torch_device, wait_for_turn
from bench.work import Work
from megatron_ds.layers.kernels import select_kernels
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead
from megatron_ds.models.sequential import HIDDEN, HeadSpec
from megatron_ds.parallel.context import ContextParallel

PLAIN = "PyTorch, logits in fp32"


def measure(title: str, work: Work) -> None:
    """Measure the head of one model."""
    device, hidden, vocab = torch_device(), work.model["hidden_size"], work.model["vocab_size"]
    x = torch.randn(work.seq_length, work.batch, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16) * STD
    targets = torch.randint(0, vocab, (work.seq_length, work.batch), device=device)
    flops = 6.0 * work.tokens * vocab * hidden
    ctx = BuildContext(kernels=select_kernels("auto", device))
    with device:
        head = LanguageModelHead(vocab, hidden, ctx, std=STD).to(torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(weight)
    found = HeadSpec.per_column("targets").with_own_labels(
        {"targets": targets.t().cpu()}, ContextParallel()
    )  # as the engine does
    labels = {name: column.to(device) for name, column in found.items()}

    def ours() -> None:
        a = x.detach().requires_grad_()
        head.losses({HIDDEN: a}, labels).terms["targets"].backward()
        head.weight.grad = None

    def plain() -> None:
        a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        F.cross_entropy(F.linear(a, w).float().flatten(0, 1), targets.flatten(), reduction="sum").backward()

    def products() -> None:
        flat = x.flatten(0, 1)
        logits = flat @ weight.t()
        logits @ weight
        logits.t() @ flat

    runs: dict[str, Callable[[], object]] = {PRODUCTS: products, OURS: ours, PLAIN: plain}
    for name, run in runs.items():
        guarded(title, name, lambda: measure_runs(title, name, run, flops=flops))  # noqa: B023
    guarded("profile", f"{title}, {OURS}", lambda: profile(f"{title}, {OURS}", runs[OURS]))


if __name__ == "__main__":
    wait_for_turn()
    measure(HEAD, BLOCKS)
    measure(SMALL_HEAD, LLAMA)
