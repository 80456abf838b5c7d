"""Changes of a model's layers before they are built, such as another head."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec

ChangeLayers = Callable[[list[LayerSpec], BuildContext], list[LayerSpec]]
"""(a model's own layers, build context) -> the layers to train."""


def own_layers(layers: list[LayerSpec], ctx: BuildContext) -> list[LayerSpec]:
    """Return a model's own layers."""
    return layers
