"""The trace of each layer of a model."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.trace.setting import TraceSetting


def trace_layers(specs_of: Callable[[BuildContext], list[LayerSpec]], setting: TraceSetting) -> list[LayerTrace]:
    """Return the trace of every layer, in order. Equal layers are traced once.

    Does not communicate.

    Args:
        specs_of: builds the layers' specs in a build context, such as `ModelConfig.build_layers`.
        setting: the rank's place, its micro-batch, and options.
    """
    raise NotImplementedError
