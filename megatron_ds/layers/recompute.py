"""Activation recomputation (Chen et al. 2016): whole blocks, or the attention core alone (Korthikanti et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_ds.parallel.random import RngStreams

_NON_REENTRANT = partial(torch_checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class Recompute:
    """What is recomputed in the backward pass, and by whom.

    Attributes:
        mode: "none"; "selective" = the attention core, cheap and the largest activations at long sequences;
            "full" = whole blocks, keeping one (S, B, H) a block.
        checkpoint: `checkpoint(fn, *tensors)`; torch's non-reentrant one, or DeepSpeed's, which can partition what it
            keeps over the tensor ranks or move it to the CPU.
        rng: the streams to replay; None where nothing is random.
    """

    mode: str = "none"
    checkpoint: Callable[..., Any] = _NON_REENTRANT
    rng: RngStreams | None = None

    def run(self, mode: str, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, recomputed in the backward pass if this is the mode in force and gradients are on."""
        if self.mode != mode or not torch.is_grad_enabled():
            return fn(*args)
        return self.checkpoint(self.rng.replayable(fn) if self.rng is not None else fn, *args)
