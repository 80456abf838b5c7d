"""Hooks that see the passes of a layer's modules as DeepSpeed's hooks of ZeRO-3 do.

DeepSpeed 0.19.8 fetches weights before a module is called and when the first gradient of its outputs arrives, and
releases them when it returns and when all gradients of its inputs are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.planner.moments import Event, ModulePass


def watch_modules(layer: nn.Module, notify: Callable[[ModulePass], None]) -> None:
    """Attach hooks to a layer and all modules in it, which call `notify` with each of their passes."""
    for name, part in layer.named_modules():
        _Hooks(part, partial(_pass, notify, name))


def _pass(notify: Callable[[ModulePass], None], name: str, event: Event, backward: bool) -> None:
    notify(ModulePass(event, name, backward))


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

    @torch.compiler.disable  # as DeepSpeed's: a compiled block has a graph for each part between two of them
    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        self._add(Event.BEFORE, False)
        self._inputs = 0
        return _each(partial(_Notify.apply, self._passed_back), inputs, self._count)

    @torch.compiler.disable
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
