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
            _add_low_rank(slot, one, adapter, parameters)
        else:
            _scale(slot, adapter, parameters["l"])
    return merged


def _add_low_rank(slot: Tensor, one: Projection, adapter: LoRASpec, parameters: Mapping[str, Tensor]) -> None:
    """W + s B A, in place."""
    change = adapter.scale * (parameters["b"] @ parameters["a"])  # (out, in)
    slot += (change.t() if one.is_lookup else change).reshape(slot.shape)


def _scale(slot: Tensor, adapter: IA3Spec, vector: Tensor) -> None:
    """W times l, in place; l is (1, in), or (out, 1)."""
    flat = slot.reshape(-1, vector.numel()) if adapter.of_input else slot.reshape(vector.numel(), -1)
    slot.copy_((flat * vector).view(slot.shape))
