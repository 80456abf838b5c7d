"""The columns of a micro-batch as an engine gives them to a model, without values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ds.columns import COLUMNS, DOCUMENT_BOUNDS, POSITION_IDS, find_column
from megatron_ds.models.sequential import LayerSpec, head_of, input_activations, own_of, positions_of
from megatron_ds.planner.trace.setting import TraceSetting


def make_batch(
    specs: Sequence[LayerSpec], setting: TraceSetting, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the columns that enter the first layer, and those that the head reads.

    Args:
        specs: the layers.
        setting: names of the columns, and lengths.
        device: of the tensors.
    """
    head = head_of(specs)
    ids = [name for name in specs[0].columns if name.endswith("input_ids")]
    names = [name for name in COLUMNS if name in setting.columns or name in ids]
    columns = {name: _column(name, setting, device) for name in (*names, *head.label_columns)}
    if POSITION_IDS.name in columns:
        size = (setting.micro_batch_size, setting.documents + 1)
        columns[DOCUMENT_BOUNDS] = torch.empty(size, dtype=torch.int32, device=device)
    found: dict[str, Tensor] = {}
    for name in head.label_columns:
        if head.divides_labels and setting.context.size > 1:
            found[own_of(name)] = _own(columns[name], find_column(name).has_positions, setting)
        own = found.get(own_of(name), columns[name])
        if find_column(name).has_positions and find_column(name).ignored is not None and own.dim() == 2:
            count = round(own.numel() * setting.labelled)
            found[positions_of(name)] = torch.empty(count, dtype=torch.int64, device=device)
    return input_activations(columns, specs[0].columns), head.labels_in({**columns, **found})


def _column(name: str, setting: TraceSetting, device: torch.device) -> Tensor:
    column = find_column(name)
    shape = column.shape(setting.seq_length, setting.target_length, setting.num_labels)
    dtype = getattr(torch, column.dtype)
    return torch.empty((setting.micro_batch_size, *shape), dtype=dtype, device=device)


def _own(labels: Tensor, has_positions: bool, setting: TraceSetting) -> Tensor:
    """Return a context rank's labels."""
    if not has_positions:
        return torch.empty_like(labels)
    return labels.new_empty((labels.shape[0], labels.shape[1] // setting.context.size))


def shapes_of(activations: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...], torch.dtype, bool], ...]:
    """Return names, shapes and dtypes of activations, and whether they have gradients."""
    return tuple((name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in activations.items())
