"""The order in which modules run in forward and backward passes, as DeepSpeed's hooks of ZeRO-3 see it.

DeepSpeed 0.19.8 fetches weights before a module is called and when the first gradient of its outputs arrives, and
releases them when it returns and when all gradients of its inputs are there. A recomputed forward pass counts as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.trace import trace_layers


class Event(Enum):
    """A moment at which DeepSpeed fetches or releases the weights of a module."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True)
class ModulePass:
    """A module begins or ends its forward or backward pass.

    Attributes:
        event: which of both.
        module: its name.
        backward: it is the backward pass.
    """

    event: Event
    module: str
    backward: bool

    def within(self, layer: str) -> ModulePass:
        """Return the same pass of a layer's module, with its name in the model."""
        return ModulePass(self.event, f"{layer}.{self.module}" if self.module else layer, self.backward)


@dataclass
class PassRecorder:
    """The passes of the modules of some layers, each of which runs forward and then backward.

    Attributes:
        passes: name of a layer -> its passes, in order, with the modules' names in the layer.
    """

    passes: dict[str, list[ModulePass]] = field(default_factory=lambda: defaultdict(list))

    def watch(self, layer: str, module: nn.Module) -> None:
        """Attach hooks to all modules of a layer that is about to run once forward and backward."""
        for name, part in module.named_modules():
            _Hooks(part, partial(self._add, layer, name))

    def _add(self, layer: str, name: str, event: Event, backward: bool) -> None:
        if not name and event == Event.BEFORE and not backward:  # a layer that runs twice: the second run counts
            self.passes[layer].clear()
        self.passes[layer].append(ModulePass(event, name, backward))

    def micro_batch(self, layers: Sequence[str], like: Mapping[str, str]) -> list[ModulePass]:
        """Return the passes of all layers in a micro-batch, and those of the model, whose name is empty.

        Args:
            layers: names, in order.
            like: name of a layer -> the name of one that ran in its place.
        """
        forward, backward = [], []
        for layer in layers:
            found = self.passes[like[layer]]
            turning = next((index for index, one in enumerate(found) if one.backward), len(found))
            forward += [one.within(layer) for one in found[:turning]]
            backward.append([one.within(layer) for one in found[turning:]])
        begin, end = ModulePass(Event.BEFORE, "", backward=False), ModulePass(Event.AFTER, "", backward=False)
        turn = ModulePass(Event.BEFORE, "", backward=True)
        return [begin, *forward, end, turn, *(one for of_layer in reversed(backward) for one in of_layer)]


def record_passes(given: PlanInput) -> list[ModulePass]:
    """Return the passes of a run's modules in a micro-batch, by a trace of its layers. For models in one stage."""
    recorder = PassRecorder()
    traces = trace_layers(given.layers, given.trace_setting(), recorder.watch)
    return recorder.micro_batch([one.name for one in traces], {one.name: one.like for one in traces})


class _Hooks:
    """Hooks of one module.

    Args:
        module: gets them.
        add: called with each event, and whether it is of the backward pass.
    """

    def __init__(self, module: nn.Module, add: Callable[[Event, bool], None]) -> None:
        self._add, self._calls, self._inputs = add, 0, 0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        self._add(Event.BEFORE, False)
        self._inputs = 0
        return _each(partial(_Notify.apply, self._passed_back), inputs, self._count)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._add(Event.AFTER, False)

        def count(tensor: Tensor) -> None:
            self._calls += 1

        return _each(partial(_Notify.apply, self._arrived), output, count)

    def _count(self, tensor: Tensor) -> None:
        self._inputs += tensor.requires_grad

    def _arrived(self) -> None:
        """Note a gradient of an output."""
        if self._calls > 0:
            self._add(Event.BEFORE, True)
            self._calls -= 1

    def _passed_back(self) -> None:
        """Note a gradient of an input."""
        self._inputs -= 1
        if self._inputs == 0:
            self._add(Event.AFTER, True)


class _Notify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, notify: Callable[[], None], x: Tensor) -> Tensor:
        ctx.notify = notify
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.notify()
        return None, grads[0]


def _each(function: Callable[[Tensor], Tensor], value: Any, count: Callable[[Tensor], None]) -> Any:
    """Apply a function to all tensors in tuples, lists and dicts, the latter in place; other values stay."""
    if isinstance(value, dict):
        for name in value:
            value[name] = _each(function, value[name], count)
        return value
    if isinstance(value, tuple | list):
        return type(value)(_each(function, one, count) for one in value)
    if isinstance(value, Tensor):
        count(value)
        return function(value)
    return value
