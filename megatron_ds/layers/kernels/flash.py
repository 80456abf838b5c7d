"""flash-attn's attention (Dao 2023): https://github.com/Dao-AILab/flash-attention."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.kernels.reference import AttentionCall, CausalAttention
from megatron_ds.layers.kernels.table import KERNELS, Candidate


def flash_attention() -> CausalAttention:
    """Return flash-attn's attention: without a copy of its inputs, and for packed documents without an (S, S) mask."""
    library = importlib.import_module("flash_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        options: dict[str, Any] = {
            "softmax_scale": call.scale,
            "causal": True,
            "window_size": (-1, -1) if call.window is None else (call.window - 1, 0),
            "softcap": call.softcap or 0.0,
        }
        if call.positions is None:
            return library.flash_attn_func(q, k, v, **options).transpose(0, 1)
        batch, length = call.positions.shape
        begins = (call.positions.flatten() == 0).nonzero().flatten().to(torch.int32)
        bounds = F.pad(begins, (0, 1), value=batch * length)
        rows = (part.flatten(0, 1) for part in (q, k, v))
        y = library.flash_attn_varlen_func(*rows, bounds, bounds, length, length, **options)
        return y.unflatten(0, (batch, length)).transpose(0, 1)

    return attend


KERNELS["attention"].register("flash", Candidate("flash_attn", flash_attention, "flash-attn"))
