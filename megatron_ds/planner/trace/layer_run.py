"""A forward and a backward pass of one layer, as it runs between its neighbours in a model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_ds.models.block import Block
from megatron_ds.models.sequential import Activations, LayerSpec, OutputHead
from megatron_ds.planner.moments import ModulePass, Moment
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.trace.module_hooks import watch_modules
from megatron_ds.planner.trace.recorder import Recorder
from megatron_ds.planner.trace.setting import TraceSetting

_Storage = weakref.ref[torch.UntypedStorage]


@dataclass(frozen=True)
class Found:
    """A layer's trace, and how it stands between its neighbours.

    Attributes:
        trace: of the layer alone.
        output: what enters the next layer.
        free: hidden states of the input that nothing holds after the forward pass, and their bytes.
        held: those that the backward pass reads.
        passed: outputs that are inputs, with the input's name.
    """

    trace: LayerTrace
    output: Activations
    free: Mapping[str, int]
    held: set[str]
    passed: Mapping[str, str]


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


class LayerRun:
    """Passes of one layer.

    Args:
        layer: the module.
        activations: its input; `labels`: the columns that a head reads.
        recorder: sees the passes.
        setting: see `trace_layers`.
        device: of the tensors.
    """

    def __init__(
        self,
        layer: nn.Module,
        activations: Activations,
        labels: dict[str, Tensor],
        recorder: Recorder,
        setting: TraceSetting,
        device: torch.device,
    ) -> None:
        self.layer, self.activations, self.labels = layer, activations, labels
        self.recorder, self.trains = recorder, setting.trains
        self._anchor = torch.empty((), device=device, requires_grad=True)  # autograd reaches inputs through it
        self._input_grads: list[Tensor] = []
        self._seen: list[_Seen] = []  # of the pass that runs
        if setting.zero_stage == 3:
            watch_modules(layer, self._pass)

    def make_tables(self) -> int:
        """Make the tables that a block shares with others, and return their bytes."""
        before = self.recorder.live_bytes
        if isinstance(self.layer, Block):
            with self.recorder, torch.no_grad():
                self.recorder.begin_pass()  # these operations are in no trace
                self.layer.make_tables(self.activations)
        return self.recorder.live_bytes - before

    def trace(self, spec: LayerSpec) -> Found:
        """Run forward and backward, and return what was seen."""
        recorder = self.recorder
        start, on_host = recorder.live_bytes, recorder.left_out_bytes
        inputs = self._inputs()
        states = {name: weakref.ref(one.untyped_storage()) for name, one in inputs.items() if one.is_floating_point()}
        sizes = {name: inputs[name].nbytes for name in states}
        self._seen = []
        with recorder, torch.set_grad_enabled(self.trains):
            recorder.begin_pass()
            output = self._forward(inputs)
            recorder.end_pass()
        forward, forward_peak = recorder.work, recorder.peak_bytes - start
        in_forward = _moments(recorder, 0, self._seen)
        kept, host_bytes = recorder.live_bytes - start, recorder.left_out_bytes - on_host
        free = {name: sizes[name] for name, storage in states.items() if storage() is None}
        output_bytes, following, passed = self._size(output), self._following(output), _passed(output, states)
        self._seen = []
        with recorder:
            recorder.begin_pass()
            held = self._backward(spec, output, states) if self.trains else set()
            recorder.end_pass()
        del output
        grad_input = sum({recorder.serial_of(one): recorder.size_of(one) for one in self._input_grads}.values())
        gradients = {one.storage for one in self._seen if one.storage is not None}
        self._input_grads = []
        trace = LayerTrace(
            name=spec.name,
            is_block=spec.is_block,
            forward=forward,
            backward=recorder.work,
            kept_bytes=kept,
            output_bytes=output_bytes,
            forward_peak_bytes=forward_peak,
            backward_peak_bytes=kept + recorder.peak_without(gradients)[0],
            grad_input_bytes=grad_input,
            in_forward=in_forward,
            in_backward=_moments(recorder, kept, self._seen),
            recompute=recorder.replayed,
            shared_bytes=recorder.live_bytes - start,
            like=spec.name,
            host_bytes=host_bytes,
        )
        return Found(trace, following, free, held, passed)

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

    def _backward(self, spec: LayerSpec, output: Activations | Tensor, states: Mapping[str, _Storage]) -> set[str]:
        """Run the backward pass; return the inputs that it reads."""
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
        held = {name for name, storage in states.items() if storage() is not None}
        if loss.requires_grad:
            loss.backward(self._anchor.detach())
        for hook in hooks:
            hook.remove()
        return held

    def _take(self, name: str, parameter: Tensor) -> None:
        """Take a parameter's gradient as an engine does as soon as it is complete."""
        grad, recorder = parameter.grad, self.recorder
        if grad is None:  # a product has added it to a sum
            return
        self._seen.append(_Seen(len(recorder.changes), name, recorder.serial_of(grad), grad.nbytes))
        parameter.grad = None

    def _pass(self, one: ModulePass) -> None:
        self._seen.append(_Seen(len(self.recorder.changes), module_pass=one))

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


def _passed(output: Activations | Tensor, states: Mapping[str, _Storage]) -> dict[str, str]:
    """Return the names of outputs that are inputs, each with the input's name."""
    if isinstance(output, Tensor):
        return {}
    given = {storage: name for name, one in states.items() if (storage := _address(one())) is not None}
    addresses = {name: one.untyped_storage()._cdata for name, one in output.items()}
    return {name: given[address] for name, address in addresses.items() if address in given}


def _address(storage: torch.UntypedStorage | None) -> int | None:
    return None if storage is None else storage._cdata


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(one): one for one in tensors}.values())


class _Seen(NamedTuple):
    """A moment of a pass, by the number of changes of memory before it; see `Moment`. `storage` is a gradient's."""

    num_changes: int
    parameter: str = ""
    storage: int | None = None
    num_bytes: int = 0
    module_pass: ModulePass | None = None


def _moments(recorder: Recorder, live_bytes: int, seen: Sequence[_Seen]) -> tuple[Moment, ...]:
    """Return the moments of the pass that a recorder has seen, and its end.

    Args:
        recorder: has the changes of memory.
        live_bytes: when the pass began, beyond what was live before the layer's forward pass.
        seen: what happened, in order.
    """
    begin, found = 0, list[Moment]()
    handed = set[int | None]()  # gradients that are the engine's
    for one in seen:
        peak, change = recorder.peak_without(handed, begin, one.num_changes)
        live = live_bytes + change - one.num_bytes
        found.append(Moment(live_bytes + peak, live, one.parameter, one.num_bytes, one.module_pass))
        live_bytes, begin = live, one.num_changes
        if one.storage is not None:
            handed.add(one.storage)
    peak, change = recorder.peak_without(handed, begin)
    return (*found, Moment(live_bytes + peak, live_bytes + change))
