"""Merging of base weights with adapters of peft, in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ds.hf.family import Row
from megatron_ds.hf.peft.projections import Projection
from megatron_ds.hf.tensor_mapping import Sizes
from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec

Change = tuple[Projection, Row, LoRASpec | IA3Spec, Mapping[str, Tensor]]
"""A projection, the row of the weight or bias that is changed, the adapter, and its parameters by letter, fp32."""


def merged_weight(full: Tensor, changes: Sequence[Change], sizes: Sizes) -> Tensor:
    """Merge adapters into a full native weight or bias.

    Returns:
        `full` itself without changes, otherwise a new tensor in fp32.
    """
    if not changes:
        return full
    merged = full.float().clone(memory_format=torch.contiguous_format)
    for one, row, adapter, parameters in changes:
        slot = row.op.slot(one.source, merged, sizes)
        if isinstance(adapter, LoRASpec):
            _merge_low_rank(slot, one, adapter, parameters)
        else:
            _scale(slot, adapter, parameters["l"])
    return merged


def low_rank_sum(slot: Tensor, one: Projection, scale: float, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return W + s B A, (out, in).

    Args:
        slot: W with one dim per axis, fp32.
        one: its projection.
        scale: s.
        parameters: "a" (r, in) and "b" (out, r).
    """
    change = scale * (parameters["b"] @ parameters["a"])
    return (slot.reshape(change.shape[::-1]).t() if one.is_lookup else slot.reshape(change.shape)) + change


def _merge_low_rank(slot: Tensor, one: Projection, adapter: LoRASpec, parameters: Mapping[str, Tensor]) -> None:
    """Write W + s B A over W; with DoRA, each of its rows is scaled to norm m."""
    merged = low_rank_sum(slot, one, adapter.scale, parameters)
    if adapter.dora:
        merged *= (parameters["m"] / merged.norm(dim=1))[:, None]
    slot.copy_((merged.t() if one.is_lookup else merged).reshape(slot.shape))


def _scale(slot: Tensor, adapter: IA3Spec, vector: Tensor) -> None:
    """Multiply W by l in place; l is (1, in) or (out, 1)."""
    flat = slot.reshape(-1, vector.numel()) if adapter.of_input else slot.reshape(vector.numel(), -1)
    slot.copy_((flat * vector).view(slot.shape))
