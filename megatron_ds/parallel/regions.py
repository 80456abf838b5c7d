"""Names for what a step is made of, in a profile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PREFIX = "part: "
STEP = "training step"
ATTENTION, MLP, HEAD, EMBEDDING = "attention", "MLP", "head and loss", "embedding"
BLOCK, OPTIMIZER, DATA = "norms and residuals", "optimizer", "data wait"
PARTS = (ATTENTION, MLP, BLOCK, EMBEDDING, HEAD, OPTIMIZER, DATA)


def part(name: str) -> AbstractContextManager[object]:
    """What is done inside belongs to a part, and so does its backward pass. Costs nothing unless a profiler looks."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(PREFIX + name)
