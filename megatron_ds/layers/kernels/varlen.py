"""PyTorch's attention for documents of variable length (Dao 2023), which also knows windows."""

from __future__ import annotations

import importlib
import inspect
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ds.layers.kernels.documents import by_documents
from megatron_ds.layers.kernels.reference import AttentionCall, AttentionKernel, is_plain_attention
from megatron_ds.layers.kernels.table import KERNELS, Candidate

LARGEST_HEAD = 256  # of flash attention


def torch_varlen() -> AttentionKernel:
    """Return attention by `torch.nn.attention.varlen`: memory grows linearly with the sequence.

    Its arguments grow from release to release; torch 2.11 takes fewer key heads than query heads without being asked.
    Where a release can choose cuDNN, flash attention is asked for, which documents without a token are safe with.
    """
    library = importlib.import_module("torch.nn.attention.varlen")
    varlen_attn, can_choose = library.varlen_attn, hasattr(library, "_select_backend")
    known = inspect.signature(varlen_attn).parameters

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        window = (-1, 0) if call.window is None else (call.window - 1, 0)
        options: dict[str, Any] = {"scale": call.scale, "window_size": window}
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if can_choose else nullcontext():
            return by_documents(
                *(q, k, v, call),
                lambda q, k, v, bounds, longest: varlen_attn(q, k, v, bounds, bounds, longest, longest, **options),
            )

    return attend


def supports(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Return whether flash attention in torch computes a call, and plain causal attention does not."""
    fits = q.shape[-1] <= LARGEST_HEAD and q.shape[-1] % 8 == 0 and call.softcap is None
    is_needed = call.positions is not None or call.window is not None
    return is_plain_attention(q, k, v, call) and fits and is_needed


KERNELS["attention"].register("varlen", Candidate("torch", torch_varlen, "torch", supports=supports))
