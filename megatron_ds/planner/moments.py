"""Moments of a layer's passes at which an engine acts: its modules begin and end, and gradients are complete."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Event(Enum):
    """A moment at which DeepSpeed fetches or releases the weights of a module."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True)
class ModulePass:
    """A module begins or ends its forward or backward pass. A recomputed forward pass counts as one.

    Attributes:
        event: which of both.
        module: its name; empty = the model.
        backward: it is the backward pass.
    """

    event: Event
    module: str
    backward: bool

    def within(self, layer: str) -> ModulePass:
        """Return the same pass of a layer's module, with its name in the model."""
        return ModulePass(self.event, f"{layer}.{self.module}" if self.module else layer, self.backward)


@dataclass(frozen=True)
class Moment:
    """A moment of a layer's forward or backward pass, and the layer's memory until then.

    A parameter's gradient counts here from its allocation until it is complete; then it is the engine's.

    Attributes:
        peak_bytes: the most that has been live since the moment before, or since the pass began, beyond what was live
            before the layer's forward pass.
        live_bytes: what is live of it now, without the gradient that is complete.
        parameter: the parameter whose gradient is complete, by its name in the layer; empty = none.
        num_bytes: of that gradient.
        module_pass: a module of the layer begins or ends, by its name in the layer; None = none does. Such moments are
            recorded for ZeRO-3 alone.
    """

    peak_bytes: int
    live_bytes: int
    parameter: str = ""
    num_bytes: int = 0
    module_pass: ModulePass | None = None


MODEL_BEGINS = ModulePass(Event.BEFORE, "", backward=False)
MODEL_ENDS = ModulePass(Event.AFTER, "", backward=False)
MODEL_TURNS = ModulePass(Event.BEFORE, "", backward=True)
"""The passes of a model, whose backward pass never ends for DeepSpeed, because its inputs have no gradients."""
