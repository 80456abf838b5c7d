"""The output head and its loss, forward and backward, at a vocabulary of 128,256, beside its three matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.fast.kernels import profile
from bench.gpu.fast.measure import measure_runs
from bench.gpu.fast.models import BLOCKS, LLAMA
from bench.gpu.fast.targets import HEAD, OURS, PRODUCTS, SMALL_HEAD
from bench.gpu.record import guarded, torch_device, wait_for_turn
from bench.work import Work
from megatron_ds.layers.cross_entropy import VocabShard, head_loss
from megatron_ds.parallel.grid import Axis

PLAIN = "PyTorch, logits in fp32"


def measure(title: str, work: Work) -> None:
    """Measure the head of one model."""
    device, hidden, vocab = torch_device(), work.model["hidden_size"], work.model["vocab_size"]
    x = torch.randn(work.seq_length, work.batch, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16) * 0.02
    targets = torch.randint(0, vocab, (work.seq_length, work.batch), device=device)
    flops = 6.0 * work.tokens * vocab * hidden

    def ours(a: Tensor, w: Tensor) -> Tensor:
        return head_loss(a, VocabShard(w, None, vocab, Axis()), targets)

    def plain(a: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(a, w).float().flatten(0, 1), targets.flatten(), reduction="sum")

    def products() -> None:
        flat = x.flatten(0, 1)
        logits = flat @ weight.t()
        logits @ weight
        logits.t() @ flat

    runs: dict[str, Callable[[], object]] = {
        PRODUCTS: products,
        OURS: lambda: with_gradients(ours, x, weight),
        PLAIN: lambda: with_gradients(plain, x, weight),
    }
    for name, run in runs.items():
        guarded(title, name, lambda: measure_runs(title, name, run, flops=flops))  # noqa: B023
    guarded("profile", f"{title}, {OURS}", lambda: profile(f"{title}, {OURS}", runs[OURS]))


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a loss."""
    leaves = [one.detach().requires_grad_() for one in given]
    return torch.autograd.grad(loss(*leaves), leaves)


if __name__ == "__main__":
    wait_for_turn()
    measure(HEAD, BLOCKS)
    measure(SMALL_HEAD, LLAMA)
