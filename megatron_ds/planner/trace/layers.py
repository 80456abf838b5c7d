"""The trace of each layer of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ds.dtypes import DTYPE_OF_PRECISION
from megatron_ds.layers.moe.dispatch import even_routing
from megatron_ds.layers.products import keep_gradient_sum
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import Activations, LayerSpec, OutputHead
from megatron_ds.planner.operations import GradientArrival, LayerTrace
from megatron_ds.planner.trace.batch import make_batch, shapes_of
from megatron_ds.planner.trace.context import recording_context
from megatron_ds.planner.trace.kernels import FusedAttention
from megatron_ds.planner.trace.recorder import Recorder
from megatron_ds.planner.trace.setting import TraceSetting
from megatron_ds.planner.trace.signature import signature_of

Watch = Callable[[str, nn.Module], None]
"""(name of a spec, module), called with each layer that is run, once it is built."""


def trace_layers(
    specs_of: Callable[[BuildContext], list[LayerSpec]], setting: TraceSetting, watch: Watch | None = None
) -> list[LayerTrace]:
    """Return the trace of every layer, in order. Equal layers are traced once.

    Does not communicate.

    Args:
        specs_of: builds the layers' specs in a build context, such as `ModelConfig.build_layers`.
        setting: the rank's place, its micro-batch, and options.
        watch: sees the modules of the layers that are run.
    """
    recorder = Recorder()
    with recording_context(setting, recorder) as ctx, _without_values(setting, recorder):
        return _Tracer(setting, recorder, specs_of(ctx), watch).trace()


@contextmanager
def _without_values(setting: TraceSetting, recorder: Recorder) -> Iterator[None]:
    """Have tensors within the block have no values, and everything that depends on them be even."""
    with ExitStack() as stack:
        stack.enter_context(even_routing())
        if setting.device_type == "cpu":
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        else:
            stack.enter_context(FusedAttention(recorder))
        yield


@dataclass(frozen=True)
class _Found:
    """A layer's trace, and what enters the next layer."""

    trace: LayerTrace
    output: Activations


class _Tracer:
    """The layers of a model, one after the other.

    Args:
        setting, recorder: see `trace_layers`.
        specs: the layers.
        watch: see `trace_layers`.
    """

    def __init__(
        self, setting: TraceSetting, recorder: Recorder, specs: Sequence[LayerSpec], watch: Watch | None
    ) -> None:
        self._watch = watch
        self.setting, self.recorder, self.specs = setting, recorder, specs
        self.device = torch.device("cpu" if setting.device_type == "cpu" else "meta")
        self._known: dict[Hashable, _Found] = {}

    def trace(self) -> list[LayerTrace]:
        activations, labels = make_batch(self.specs, self.setting, self.device)
        traces = []
        for spec in self.specs:
            layer = self._build(spec)
            key = signature_of(layer), shapes_of(activations)
            if key not in self._known:
                run = _LayerRun(layer, activations, labels, self.recorder, self.setting.trains, self.device)
                if self._watch is not None:
                    self._watch(spec.name, layer)
                found = run.trace(spec)
                if found.trace.shared_bytes:  # made by the first run alone
                    again = run.trace(spec)
                    found = replace(again, trace=replace(again.trace, shared_bytes=found.trace.shared_bytes))
                self._known[key] = found
                shared = found.trace.shared_bytes
            else:
                found, shared = self._known[key], 0
            traces.append(replace(found.trace, name=spec.name, is_block=spec.is_block, shared_bytes=shared))
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
            if self.setting.adds_gradients_in_products and parameter.requires_grad and parameter.dim() >= 2:
                keep_gradient_sum(parameter, torch.empty_like(parameter, dtype=torch.float32))
        return layer.train(self.setting.trains)


class _Input(torch.autograd.Function):
    """A layer's input, which takes its gradient as the layer before would: without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, grads: list[Tensor]) -> Tensor:
        ctx.grads = grads
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.grads.append(grads[0])
        return None, None, None


class _Output(torch.autograd.Function):
    """A scalar whose backward pass gives a layer's output a gradient, as the layer after would: held by nobody else."""

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, *outputs: Tensor) -> Tensor:
        ctx.like = [(one.shape, one.dtype, one.device) for one in outputs]
        return scalar.view_as(scalar)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class _LayerRun:
    """Passes of one layer.

    Args:
        layer: the module.
        activations: its input; `labels`: the columns that a head reads.
        recorder: sees the passes.
        trains: False = forward without gradients.
        device: of the tensors.
    """

    def __init__(
        self,
        layer: nn.Module,
        activations: Activations,
        labels: dict[str, Tensor],
        recorder: Recorder,
        trains: bool,
        device: torch.device,
    ) -> None:
        self.layer, self.activations, self.labels = layer, activations, labels
        self.recorder, self.trains = recorder, trains
        self._anchor = torch.empty(
            (), device=device, requires_grad=True
        )  # a leaf through which autograd reaches inputs
        self._input_grads: list[Tensor] = []
        self._arrived: list[_Arrived] = []

    def trace(self, spec: LayerSpec) -> _Found:
        """Run forward and backward, and return what was seen."""
        recorder = self.recorder
        start, on_host = recorder.live_bytes, recorder.left_out_bytes
        inputs = self._inputs()
        states = [
            (weakref.ref(one.untyped_storage()), one.nbytes) for one in inputs.values() if one.is_floating_point()
        ]
        with recorder, torch.set_grad_enabled(self.trains):
            recorder.begin_pass()
            output = self._forward(inputs)
            recorder.end_pass()
        forward, forward_peak = recorder.work, recorder.peak_bytes - start
        kept, host_bytes = recorder.live_bytes - start, recorder.left_out_bytes - on_host
        released = sum(num_bytes for storage, num_bytes in states if storage() is None)
        output_bytes, following = self._size(output), self._following(output)
        with recorder:
            recorder.begin_pass()
            if self.trains:
                self._backward(spec, output)
            recorder.end_pass()
        del output
        seen = _Backward(recorder, kept, self._arrived)
        grad_input = sum({recorder.serial_of(one): recorder.size_of(one) for one in self._input_grads}.values())
        self._input_grads, self._arrived = [], []
        trace = LayerTrace(
            name=spec.name,
            is_block=spec.is_block,
            forward=forward,
            backward=recorder.work,
            kept_bytes=kept,
            output_bytes=output_bytes,
            forward_peak_bytes=forward_peak,
            backward_peak_bytes=seen.peak_bytes,
            grad_input_bytes=grad_input,
            arrivals=seen.arrivals,
            recompute=recorder.replayed,
            shared_bytes=recorder.live_bytes - start,
            released_bytes=released,
            like=spec.name,
            host_bytes=host_bytes,
        )
        return _Found(trace, following)

    def _inputs(self) -> Activations:
        """Return the input, with hidden states that nothing else holds."""
        made = self.activations.items()
        return {name: _like(one).detach() if one.is_floating_point() else one for name, one in made}

    def _forward(self, given: Activations) -> Activations | Tensor:
        """Run the layer, and let go of its input."""
        for name, one in given.items():
            if self.activations[name].requires_grad:
                given[name] = _Input.apply(one, self._anchor, self._input_grads)
            del one
        labels = (self.labels,) if isinstance(self.layer, OutputHead) else ()
        return self.layer({name: given.pop(name) for name in list(given)}, *labels)

    def _backward(self, spec: LayerSpec, output: Activations | Tensor) -> None:
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))
            for name, parameter in self.layer.named_parameters()
            if parameter.requires_grad
        ]
        if isinstance(output, Tensor):
            assert spec.head is not None
            loss = spec.head.scaled_loss(output, [1.0] * len(spec.head.terms))
        else:
            outputs = _distinct(one for one in output.values() if one.requires_grad)
            loss = _Output.apply(self._anchor.detach(), *outputs)
            del outputs
            output.clear()
        if loss.requires_grad:
            loss.backward(self._anchor.detach())
        for hook in hooks:
            hook.remove()

    def _take(self, name: str, parameter: Tensor) -> None:
        """Take a parameter's gradient as an engine does as soon as it is complete."""
        grad, recorder = parameter.grad, self.recorder
        if grad is None:  # a product has added it to a sum
            return
        self._arrived.append(_Arrived(name, recorder.serial_of(grad), grad.nbytes, len(recorder.changes)))
        parameter.grad = None

    def _size(self, output: Activations | Tensor) -> int:
        """Return the bytes of an output that the layer has made."""
        tensors = [output] if isinstance(output, Tensor) else list(output.values())
        sizes = {self.recorder.serial_of(one): self.recorder.size_of(one) for one in tensors}
        return sum(sizes.values())

    def _following(self, output: Activations | Tensor) -> Activations:
        """Return tensors like the output for the next layer, whose memory is not counted there."""
        if isinstance(output, Tensor):
            return {}
        return {name: _like(one) if one.is_floating_point() else self.activations[name] for name, one in output.items()}


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x.detach()).requires_grad_(x.requires_grad)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(one): one for one in tensors}.values())


class _Arrived(NamedTuple):
    """A parameter's gradient: its name, its storage and size, and how many changes of memory came before."""

    name: str
    storage: int | None
    num_bytes: int
    num_changes: int


class _Backward:
    """The memory of a backward pass.

    Attributes:
        peak_bytes: the most, beyond what was live before the forward pass, without the gradients of parameters.
        arrivals: of the gradients, and the end of the pass; a gradient counts there until it arrives.
    """

    def __init__(self, recorder: Recorder, kept_bytes: int, arrived: Sequence[_Arrived]) -> None:
        gradients, handed = {one.storage for one in arrived}, set[int | None]()
        self.peak_bytes = kept_bytes + recorder.peak_without(gradients)[0]
        live, begin, found = kept_bytes, 0, []
        for one in arrived:
            peak, change = recorder.peak_without(handed, begin, one.num_changes)
            found.append(GradientArrival(one.name, live + peak, live + change - one.num_bytes, one.num_bytes))
            live, begin = found[-1].live_bytes, one.num_changes
            handed.add(one.storage)
        peak, change = recorder.peak_without(handed, begin)
        self.arrivals = (*found, GradientArrival("", live + peak, live + change, 0))
