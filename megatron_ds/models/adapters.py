"""Adapters beside the projections of a model's blocks, put there as its stages are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec
from megatron_ds.models.sequential import LayerSpec


@dataclass(frozen=True)
class AdapterPlace:
    """Where one adapter is.

    Attributes:
        module: name of an attention or MLP in the model, such as "blocks.0.attention".
        outputs: the projections in it that share it, such as ("q",); see `adapt` there.
        adapter: what it is.
    """

    module: str
    outputs: tuple[str, ...]
    adapter: LoRASpec | IA3Spec


def with_adapters(layers: Sequence[LayerSpec], places: Sequence[AdapterPlace]) -> list[LayerSpec]:
    """The same stages, which come with their adapters."""
    adapted = []
    for spec in layers:
        prefix = f"{spec.name}."
        mine = [
            replace(place, module=place.module.removeprefix(prefix))
            for place in places
            if place.module.startswith(prefix)
        ]
        adapted.append(replace(spec, build=partial(_build, spec, mine)) if mine else spec)
    return adapted


def _build(spec: LayerSpec, places: Sequence[AdapterPlace]) -> nn.Module:
    layer = spec.build()
    for place in places:
        module = layer.get_submodule(place.module)
        module.adapt(place.outputs, place.adapter)  # type: ignore[operator]
    return layer
