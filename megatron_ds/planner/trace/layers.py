"""The trace of each layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from megatron_ds.dtypes import DTYPE_OF_PRECISION
from megatron_ds.layers.products import keep_gradient_sum
from megatron_ds.layers.scaled_dot_product import replaced_by
from megatron_ds.layers.values import without_values
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec, OutputHead
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.trace.batch import make_batch, shapes_of
from megatron_ds.planner.trace.context import recording_context
from megatron_ds.planner.trace.kernels import torch_attention
from megatron_ds.planner.trace.layer_run import Found, LayerRun
from megatron_ds.planner.trace.operator_results import OperatorResults
from megatron_ds.planner.trace.recorder import Recorder
from megatron_ds.planner.trace.setting import TraceSetting
from megatron_ds.planner.trace.signature import signature_of


def trace_layers(
    specs_of: Callable[[BuildContext], list[LayerSpec]], setting: TraceSetting, results: OperatorResults | None = None
) -> list[LayerTrace]:
    """Return the trace of every layer, in order. Equal layers are traced once.

    Does not communicate.

    Args:
        specs_of: builds the layers' specs in a build context, such as `ModelConfig.build_layers`.
        setting: the rank's place, its micro-batch, and options.
        results: of operators, which many traces share; None = this one has its own.
    """
    recorder = Recorder(results)
    with recording_context(setting, recorder) as ctx, _without_values(setting):
        return _Tracer(setting, recorder, specs_of(ctx)).trace()


@contextmanager
def _without_values(setting: TraceSetting) -> Iterator[None]:
    """Have tensors within the block have no values, and everything that depends on them be even."""
    with ExitStack() as stack:
        stack.enter_context(without_values())
        if setting.device_type == "cpu":
            from torch._subclasses.fake_tensor import FakeTensorMode  # its imports take a while

            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        else:
            stack.enter_context(replaced_by(torch_attention()))
        yield


class _Tracer:
    """The layers of a model, one after the other.

    Args:
        setting, recorder: see `trace_layers`.
        specs: the layers.
    """

    def __init__(self, setting: TraceSetting, recorder: Recorder, specs: Sequence[LayerSpec]) -> None:
        self.setting, self.recorder, self.specs = setting, recorder, specs
        self.device = torch.device("cpu" if setting.device_type == "cpu" else "meta")
        self._known: dict[Hashable, Found] = {}

    def trace(self) -> list[LayerTrace]:
        """Run all layers that differ."""
        activations, labels = make_batch(self.specs, self.setting, self.device)
        held: set[str] = set()  # activations that backward passes of earlier layers read
        traces = []
        for spec in self.specs:
            layer = self._build(spec)
            key = signature_of(layer), shapes_of(activations)
            if key not in self._known:
                run = LayerRun(layer, activations, labels, self.recorder, self.setting, self.device)
                shared = run.make_tables()
                found = run.trace(spec)
                shared += found.trace.shared_bytes
                if found.trace.shared_bytes:  # what is shared is made by the first run alone
                    found = run.trace(spec)
                self._known[key] = found
            else:
                shared = 0
            found = self._known[key]
            released = sum(num_bytes for name, num_bytes in found.free.items() if name not in held)
            trace = replace(found.trace, shared_bytes=shared, released_bytes=released)
            traces.append(replace(trace, name=spec.name, is_block=spec.is_block))
            held = {name for name, given in found.passed.items() if given in held or given in found.held}
            activations = found.output
        return traces

    def _build(self, spec: LayerSpec) -> nn.Module:
        """Build a layer as an engine does: in the run's dtype and on its device."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE_OF_PRECISION[self.setting.precision])
        try:
            with self.device:
                layer = spec.build()
        finally:
            torch.set_default_dtype(default)
        if isinstance(layer, OutputHead):
            assert spec.head is not None, spec
            layer.spec = spec.head
        for name, parameter in layer.named_parameters():
            full = spec.tied.get(name, f"{spec.name}.{name}")
            parameter.requires_grad_(self.setting.trains and full not in self.setting.frozen)
            if self.setting.compile and self.setting.zero_stage == 3:
                parameter.ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed names it: products of divided weights are in no graph
            if self.setting.adds_gradients_in_products and parameter.requires_grad and parameter.dim() >= 2:
                keep_gradient_sum(parameter, torch.empty_like(parameter, dtype=torch.float32))
        return layer.train(self.setting.trains)
