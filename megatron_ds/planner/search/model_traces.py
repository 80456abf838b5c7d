"""Traces of one model in many settings, in which each distinct layer alone is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.trace.layers import trace_layers
from megatron_ds.planner.trace.operator_results import OperatorResults
from megatron_ds.planner.trace.setting import TraceSetting


class ModelTraces:
    """The traces of a model's layers by setting.

    Layers that are equal in the first setting are equal in the others, so that models with many layers are built as a
    whole once.

    Args:
        layers: build context -> the layers.
        first: a setting in which all layers are traced.
    """

    def __init__(self, layers: Callable[[BuildContext], list[LayerSpec]], first: TraceSetting) -> None:
        self._layers, self._first = layers, first
        self._results = OperatorResults()
        self._known: dict[TraceSetting, list[LayerTrace]] = {}

    @cached_property
    def first(self) -> list[LayerTrace]:
        """The traces in the first setting."""
        return trace_layers(self._layers, self._first, self._results)

    @cached_property
    def like(self) -> dict[str, str]:
        """Name of a layer -> name of the equal layer that is run."""
        return {trace.name: trace.like or trace.name for trace in self.first}

    def of(self, setting: TraceSetting) -> list[LayerTrace]:
        """Return the traces of all layers in a setting."""
        if setting == self._first:
            return self.first
        if setting not in self._known:
            run = {trace.name: trace for trace in trace_layers(self._distinct, setting, self._results)}
            self._known[setting] = [self._copy(trace, run) for trace in self.first]
        return self._known[setting]

    def _distinct(self, ctx: BuildContext) -> list[LayerSpec]:
        names = set(self.like.values())
        return [spec for spec in self._layers(ctx) if spec.name in names]

    def _copy(self, named: LayerTrace, run: dict[str, LayerTrace]) -> LayerTrace:
        """Return the trace of a layer: that of the equal one that was run, which alone has what it leaves for all."""
        found = run[self.like[named.name]]
        if found.name == named.name:
            return found
        return replace(found, name=named.name, is_block=named.is_block, shared_bytes=0)
