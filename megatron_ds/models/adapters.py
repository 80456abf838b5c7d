"""Adapters of the projections in a model's blocks, added when its layers are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec
from megatron_ds.models.sequential import LayerSpec


@dataclass(frozen=True)
class AdapterPlace:
    """One adapter and its place in the model.

    Attributes:
        module: name of an attention or feed-forward layer in the model, such as "blocks.0.attention".
        outputs: projections in that layer that share the adapter, such as ("q",); an argument of its `adapt`.
        adapter: rank, scale and initialisation.
    """

    module: str
    outputs: tuple[str, ...]
    adapter: LoRASpec | IA3Spec


def with_adapters(layers: Sequence[LayerSpec], places: Sequence[AdapterPlace]) -> list[LayerSpec]:
    """Return the same layer specs, whose modules are built with their adapters."""
    adapted = []
    for spec in layers:
        prefix = f"{spec.name}."
        own = [
            replace(place, module=place.module.removeprefix(prefix))
            for place in places
            if place.module.startswith(prefix)
        ]
        adapted.append(replace(spec, build=partial(_build, spec, own)) if own else spec)
    return adapted


def _build(spec: LayerSpec, places: Sequence[AdapterPlace]) -> nn.Module:
    layer = spec.build()
    for place in places:
        module = layer.get_submodule(place.module)
        module.adapt(place.outputs, place.adapter)  # type: ignore[operator]
    return layer
