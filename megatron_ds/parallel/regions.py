"""Names of the parts of a training step in a profile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PREFIX = "part: "
STEP = "training step"
ATTENTION, MLP, HEAD, EMBEDDING = "attention", "MLP", "head and loss", "embedding"
BLOCK, OPTIMIZER, DATA = "norms and residuals", "optimizer", "data wait"
ROUTER, DISPATCH, EXPERTS = "router", "dispatch of tokens", "experts"
NEIGHBOURS = "neighbours: exchange through memory"
PARTS = (ATTENTION, MLP, ROUTER, DISPATCH, EXPERTS, BLOCK, EMBEDDING, HEAD, OPTIMIZER, DATA)


def profiled(part: str) -> AbstractContextManager[object]:
    """Mark the operations inside, and their backward pass, as a part of the step. Free unless a profiler is active."""
    return annotated(PREFIX + part)


def annotated(name: str) -> AbstractContextManager[object]:
    """Mark the operations inside in a profile. Free unless a profiler is active."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(name)
