"""flash-attn's attention, releases 2, 3 and 4 (Dao 2023; Shah et al. 2024).

https://github.com/Dao-AILab/flash-attention: 2 is `flash_attn`, 3 (Hopper) `flash_attn_interface`, 4 (Hopper and
Blackwell) `flash_attn.cute`. They differ in the arguments that say "no window", and in what they return.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.kernels.documents import by_documents
from megatron_ds.layers.kernels.reference import AttentionCall, AttentionKernel, is_plain_of_last_queries
from megatron_ds.layers.kernels.table import KERNELS, Candidate


def flash_attention(module: str = "flash_attn", everything: int | None = -1) -> AttentionKernel:
    """Return flash-attn's attention: without a copy of its inputs, and for packed documents without an (S, S) mask.

    It takes fewer queries than keys for the last ones (release 2.1 and later).

    Args:
        module: the Python module of the release.
        everything: its bound of a window that has none.
    """
    library = importlib.import_module(module)

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        options: dict[str, Any] = {
            "softmax_scale": call.scale,
            "causal": True,
            "window_size": (everything, everything) if call.window is None else (call.window - 1, 0),
            "softcap": call.softcap or 0.0,
        }
        if torch.are_deterministic_algorithms_enabled():
            options["deterministic"] = True
        if call.positions is None:
            rows = (part.transpose(0, 1) for part in (q, k, v))
            return _output(library.flash_attn_func(*rows, **options)).transpose(0, 1)

        def by_tokens(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
            return _output(library.flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, **options))

        return by_documents(q, k, v, call, by_tokens)

    return attend


def _output(result: Any) -> Tensor:
    """Return the output; some releases return the log-sum-exp with it."""
    return result[0] if isinstance(result, tuple) else result


def supports_3(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Return whether release 3 computes a call: on Hopper."""
    return is_plain_of_last_queries(q, k, v, call) and _generation(q) in (None, 9)


def supports_4(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Return whether release 4 computes a call: on Hopper and Blackwell; it has no backward pass of capped scores."""
    return is_plain_of_last_queries(q, k, v, call) and call.softcap is None and _generation(q) in (None, 9, 10)


def _generation(q: Tensor) -> int | None:
    """Return the major number of a GPU's compute capability; None on another device."""
    return torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else None


FLASH_3 = partial(flash_attention, "flash_attn_interface")
FLASH_4 = partial(flash_attention, "flash_attn.cute", None)
for name, one in {
    "flash3": Candidate("flash_attn_interface", FLASH_3, "flash-attn-3", supports=supports_3),
    "flash4": Candidate("flash_attn.cute", FLASH_4, "flash-attn-4", supports=supports_4),
    "flash": Candidate("flash_attn", flash_attention, "flash-attn", supports=is_plain_of_last_queries),
}.items():
    KERNELS["attention"].register(name, one)
