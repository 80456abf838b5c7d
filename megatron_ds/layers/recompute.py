"""Activation recomputation (Chen et al. 2016): full blocks, or the attention core alone (Korthikanti et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_ds.layers.host_offload import HostOffload
from megatron_ds.parallel.random import RngStreams

ATTENTION_OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_flash_attention_forward",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
"""Operators that compute the output of attention and its log-sum-exp, and need no more for their backward pass."""


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return what torch's checkpoint does with the results of an operator."""
    is_kept = operator.name() in ATTENTION_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


BLOCKS = partial(torch_checkpoint, use_reentrant=False)
"""`checkpoint(fn, *tensors)`: keep the inputs of `fn`, and run it again in the backward pass."""

BLOCKS_WITHOUT_ATTENTION = partial(
    torch_checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy)
)
"""The same, but keep what `ATTENTION_OPERATORS` return too, which run once."""

_REPLAYING: ContextVar[bool] = ContextVar("replaying", default=False)


def is_replaying() -> bool:
    """Return whether what runs has run before, and runs again for the backward pass alone."""
    return _REPLAYING.get()


@dataclass(frozen=True)
class Recompute:
    """The part of a block that is recomputed in the backward pass, and the checkpoint function that does it.

    Attributes:
        mode: "none"; "selective" = the attention core, which is cheap and has the largest activations at long
            sequences; "full" = complete blocks, keeping one (S, B, H) tensor per block.
        checkpoint: `checkpoint(fn, *tensors)`: torch's non-reentrant function, or DeepSpeed's, which can partition the
            saved activations over the tensor ranks or move them to the CPU.
        rng: the random streams to replay; None if nothing is random.
        offload: where the first argument of what is recomputed is kept; None = on the device.
    """

    mode: str = "none"
    checkpoint: Callable[..., Any] = BLOCKS
    rng: RngStreams | None = None
    offload: HostOffload | None = None

    def run(self, mode: str, fn: Callable[..., Any], *args: Any) -> Any:
        """Return `fn(*args)`; the backward pass recomputes it if `mode` is this object's and gradients are enabled."""
        if self.mode != mode or not torch.is_grad_enabled():
            return fn(*args)
        kept = self.offload.keeping(args[0]) if self.offload is not None else nullcontext()
        with kept:
            return self.checkpoint(_marking_replays(self.rng.replayable(fn) if self.rng is not None else fn), *args)


def _marking_replays(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `fn` so that `is_replaying` is true in every call but the first."""
    has_run = False

    def run(*args: Any) -> Any:
        nonlocal has_run
        token = _REPLAYING.set(has_run)
        has_run = True
        try:
            return fn(*args)
        finally:
            _REPLAYING.reset(token)

    return run
