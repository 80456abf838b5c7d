"""A training step of one pipeline stage as its memory sees it: forward and backward passes in DeepSpeed's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ds.models.sequential import LayerSpec
from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.memory.engine import GRADIENTS, EngineMemory
from megatron_ds.planner.memory.ledger import Ledger
from megatron_ds.planner.moments import MODEL_BEGINS, MODEL_ENDS, MODEL_TURNS, Moment
from megatron_ds.planner.operations import LayerTrace

ACTIVATIONS, GRAD_INPUT = "activations", "gradients of activations"
BOUNDARIES, BATCH = "boundaries", "batch"


@dataclass(frozen=True)
class Boundary:
    """Tensors that cross the boundaries of a pipeline stage for one micro-batch.

    Attributes:
        entering_bytes, leaving_bytes: of the hidden states; 0 = there is no boundary.
        columns_bytes: of the columns of the batch that enter and leave with them.
    """

    entering_bytes: int = 0
    leaving_bytes: int = 0
    columns_bytes: int = 0


class StageRun:
    """One step of a stage.

    Args:
        traces: of the stage's layers.
        held: the stage's parameters.
        specs: of its layers.
        engine: its memory.
        boundary: what it receives and sends.
        passes: from `one_stage` or `pipelined_stage`.
        batch_bytes: of the step's columns on the device, and of tables that layers share.
    """

    def __init__(
        self,
        traces: Sequence[LayerTrace],
        held: HeldStage,
        specs: Sequence[LayerSpec],
        engine: EngineMemory,
        boundary: Boundary,
        passes: Sequence[tuple[str, int]],
        batch_bytes: int = 0,
    ) -> None:
        self._traces, self._engine = traces, engine
        self._boundary, self._passes, self._batch_bytes = boundary, passes, batch_bytes
        self.device: Ledger = engine.device
        self.in_flight = 0
        by_name = {one.name: one for one in held.parameters}
        frees = [0, *(trace.released_bytes for trace in traces[1:]), 0]  # what enters a stage is held
        self._layers = [
            _Layer.find(trace, spec, by_name, (frees[index], frees[index + 1]))
            for index, (trace, spec) in enumerate(zip(traces, specs))
        ]
        uses = [one.name for layer in self._layers for one in layer.by_name.values()]
        self._num_uses = {name: uses.count(name) for name in by_name}
        self._waiting: dict[str, int] = {}  # gradients of shared parameters -> uses that are still to come

    def run(self) -> None:
        """Follow a step, after which the ledgers have its peak."""
        self.device.moment = "between two steps"
        self._engine.build()
        self.device.add(BATCH, self._batch_bytes)
        self.device.add(BOUNDARIES, max(self._boundary.entering_bytes, self._boundary.leaving_bytes))
        self.device.add(BOUNDARIES, min(2, len(self._passes) // 3) * self._kept_by_loss_bytes)
        self.device.reset_peak()
        last = max((micro for kind, micro in self._passes if kind == "backward"), default=0)
        held = 0
        for kind, micro in self._passes:
            if kind == "forward":
                held += 1
                self.in_flight = max(self.in_flight, held)
                self._forward(micro)
            elif kind == "backward":
                self._backward(micro)
                held -= 1
                self.device.moment = f"reduction of gradients, micro-batch {micro + 1}"
                self._engine.end_backward(is_last=micro == last)
            elif not self._kept_by_loss_bytes:  # the gradient of what entered is sent
                self.device.release(BOUNDARIES, 2 * self._boundary.entering_bytes + self._boundary.columns_bytes)
        self.device.moment = "update of the weights"
        self._engine.step()

    # ---- one pass --------------------------------------------------------------------------------------------------

    def _forward(self, micro: int) -> None:
        # received and cloned: the clone is what the layers keep
        self.device.add(BOUNDARIES, 2 * self._boundary.entering_bytes + 2 * self._boundary.columns_bytes)
        self._engine.follow(MODEL_BEGINS)
        for layer in self._layers:
            self.device.moment = f"forward pass of {layer.trace.name}, micro-batch {micro + 1}"
            self._follow(layer, layer.trace.in_forward)
            self.device.add(ACTIVATIONS, layer.trace.kept_bytes - layer.frees_bytes)
        self._engine.follow(MODEL_ENDS)
        self.device.release(BOUNDARIES, self._kept_by_loss_bytes)  # of the loss that this one takes the place of

    @property
    def _kept_by_loss_bytes(self) -> int:
        """Bytes of what entered the last stage and of its gradient, which a loss in DeepSpeed's buffers refers to."""
        boundary = self._boundary
        return 0 if boundary.leaving_bytes else 2 * boundary.entering_bytes

    def _backward(self, micro: int) -> None:
        self._engine.follow(MODEL_TURNS)
        for layer in reversed(self._layers):
            self.device.moment = f"backward pass of {layer.trace.name}, micro-batch {micro + 1}"
            self.device.release(ACTIVATIONS, layer.trace.kept_bytes - layer.freed_bytes)
            self.device.release(GRAD_INPUT)  # what the layer needs holds the gradient of its output, too
            self._follow(layer, layer.trace.in_backward)
            self.device.hold(GRAD_INPUT, layer.trace.grad_input_bytes)
        self.device.release(GRAD_INPUT)
        if self._boundary.entering_bytes:  # the clone is released; the gradient takes its place until it is sent
            self.device.release(BOUNDARIES, self._boundary.columns_bytes)
        else:
            self.device.release(BOUNDARIES, 2 * self._boundary.columns_bytes)

    def _follow(self, layer: _Layer, moments: Sequence[Moment]) -> None:
        """Follow a pass of a layer."""
        for moment in moments:
            one = layer.by_name.get(moment.parameter)
            with self.device.holding(ACTIVATIONS, moment.peak_bytes):
                pass
            with self.device.holding(ACTIVATIONS, moment.live_bytes):
                if moment.module_pass is not None:
                    self._engine.follow(moment.module_pass.within(layer.trace.name))
                elif one is not None and one.trains:
                    self._arrive(one, moment)

    def _arrive(self, one: HeldParameter, arrival: Moment) -> None:
        """Give a gradient to the engine; that of a shared parameter waits for those of its other uses."""
        uses = self._waiting.get(one.name, self._num_uses[one.name])
        if self._num_uses[one.name] > 1:
            if uses == self._num_uses[one.name]:
                self.device.add(GRADIENTS, arrival.num_bytes)
            else:
                with self.device.holding(GRADIENTS, arrival.num_bytes):
                    pass
        if uses > 1:
            self._waiting[one.name] = uses - 1
            return
        if self._num_uses[one.name] > 1:
            del self._waiting[one.name]
            self.device.release(GRADIENTS, arrival.num_bytes)
        self._engine.gradient(one)


@dataclass(frozen=True)
class _Layer:
    """A layer of the stage.

    Attributes:
        trace: its trace.
        by_name: name in the layer -> parameter, which an earlier layer may have too.
        frees_bytes: memory of the layer before that is free after this one's forward pass.
        freed_bytes: memory of this layer that is free after the forward pass of the one behind it.
    """

    trace: LayerTrace
    by_name: Mapping[str, HeldParameter]
    frees_bytes: int
    freed_bytes: int

    @classmethod
    def find(
        cls,
        trace: LayerTrace,
        spec: LayerSpec,
        by_name: Mapping[str, HeldParameter],
        freed: tuple[int, int],
    ) -> _Layer:
        """Return the layer of a spec; `freed` has `frees_bytes` and `freed_bytes`."""
        begin = f"{spec.name}."
        own = {name.removeprefix(begin): one for name, one in by_name.items() if name.startswith(begin)}
        own |= {name: by_name[original] for name, original in spec.tied.items() if original in by_name}
        return cls(trace, own, *freed)


# ---- orders of passes ----------------------------------------------------------------------------------------------


def one_stage(num_micro_batches: int) -> list[tuple[str, int]]:
    """Return the passes of a model that is not divided into stages; those between the first and the last are alike."""
    shown = min(num_micro_batches, 3)
    return [(kind, micro) for micro in range(shown) for kind in ("forward", "backward")]


def pipelined_stage(stage: int, stages: int, num_micro_batches: int) -> list[tuple[str, int]]:
    """Return the passes of a pipeline stage in the order of DeepSpeed's `TrainSchedule`.

    A step alternates between the two kinds. "sent" is the time at which the gradient of a micro-batch's input is sent,
    and its memory released: right before the stage's next forward pass begins. Steps in the middle are left out.
    """
    count = min(num_micro_batches, 2 * stages + 2)
    return list(_train_schedule(stage, stages, count))


def _train_schedule(stage: int, stages: int, count: int) -> Iterator[tuple[str, int]]:
    before = -1
    for step in range(2 * (count + stages - 1)):
        is_forward = step % 2 == stage % 2
        if is_forward:
            micro = step // 2 - stage // 2
        else:
            micro = step // 2 - stages + (1 if stage % 2 == 0 else 0) + (stage + (stage % 2)) // 2
        if is_forward and 0 <= before < count and stage > 0:
            yield "sent", before
        if 0 <= micro < count:
            yield ("forward" if is_forward else "backward"), micro
        before = micro
