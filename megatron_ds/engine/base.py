"""The interface of an engine, with the code that its adapters share: a global batch's loss, parameters by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ds.engine.built_module import BuiltModule
from megatron_ds.engine.gathering import gather_part, send_to_rank_0
from megatron_ds.engine.gradient_sums import GradientSums
from megatron_ds.engine.group_tables import read_group_tables, set_group_tables
from megatron_ds.engine.optimizers import LR_FACTOR, GuardedOptimizer
from megatron_ds.engine.router_load import Routers, loss_scale_of
from megatron_ds.layers.documents import DocumentLimit, with_document_bounds
from megatron_ds.layers.param_spec import ParamSpec, is_untrained, spec_of
from megatron_ds.models.row_padding import RowPadding
from megatron_ds.models.sequential import HeadSpec, OutputHead
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Axes, Grid
from megatron_ds.parallel.random import RngStreams

MicroBatch = Mapping[str, Tensor]
"""Columns by name, each (B, ...): the inputs of the model's layers, as far as the data has them, and labels."""

ShardReader = Callable[[str, ParamSpec, Axes], Tensor]
"""(name, declaration, the axes that may divide it) -> this rank's shard of a parameter's value, padding included."""

PrepareReading = Callable[[Collection[str]], None]
"""Takes the names of the parameters that this rank is going to read; called on every rank, so it may communicate."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: the sum of the loss terms, each a mean over its labels (tokens, sequences) in the global batch.
        grad_norm: L2 norm of the full model's gradient before clipping.
        tokens: labelled tokens in the global batch: labels of the first term.
        applied: False if the step was skipped: the loss or the gradient norm is not finite, or fp16 overflowed.
        terms: the loss terms by name.
        metrics: the head's metrics by name, averaged over the global batch; see `Losses.metrics`.
    """

    loss: float
    grad_norm: float
    tokens: int
    applied: bool
    terms: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """Summed loss and label count per loss term, sum and weight per metric, reduced over data ranks.

    Attributes:
        sums: loss term -> sum of its labels' losses.
        counts: loss term -> number of its labels.
        metric_sums: metric -> (sum, weight).
        tallies: the head's counts.
        kept: what validation keeps of its samples, (samples, numbers).
        summarize: see `HeadSpec.summarize`; None = the head has no further metrics.
    """

    sums: Mapping[str, float]
    counts: Mapping[str, int]
    metric_sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tallies: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)
    kept: np.ndarray = field(default_factory=lambda: np.empty((0, 0)), compare=False)
    summarize: Callable[[np.ndarray, np.ndarray], Mapping[str, float]] | None = None

    @classmethod
    def unpack(
        cls, packed: Sequence[float], counts: Sequence[int], head: HeadSpec, kept: np.ndarray | None = None
    ) -> Losses:
        """Return the losses in the numbers of `HeadSpec.pack` after their reduction, with what was kept of samples."""
        rest = len(head.terms)
        end = rest + 2 * len(head.metrics)
        parts = zip(packed[rest:end:2], packed[rest + 1 : end : 2])
        return cls(
            dict(zip(head.terms, packed)),
            dict(zip(head.terms, counts)),
            dict(zip(head.metrics, parts)),
            np.asarray(packed[end : head.num_sums], dtype=np.float64),
            np.empty((0, head.num_kept)) if kept is None else kept,
            head.summarize,
        )

    def __add__(self, other: Losses) -> Losses:
        """Return the losses of the data of both."""
        return Losses(
            {name: total + other.sums[name] for name, total in self.sums.items()},
            {name: count + other.counts[name] for name, count in self.counts.items()},
            {
                name: (total + other.metric_sums[name][0], weight + other.metric_sums[name][1])
                for name, (total, weight) in self.metric_sums.items()
            },
            self.tallies + other.tallies,
            np.concatenate([self.kept, other.kept]),
            self.summarize,
        )

    @property
    def terms(self) -> dict[str, float]:
        """Mean of each loss term; 0 if it has no labels."""
        return {name: total / self.counts[name] if self.counts[name] else 0.0 for name, total in self.sums.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric, without those that have no weight; and what follows from counts and kept numbers."""
        averages = {name: total / weight for name, (total, weight) in self.metric_sums.items() if weight}
        return averages | dict(self.summarize(self.tallies, self.kept) if self.summarize is not None else {})

    @property
    def mean(self) -> float:
        """The loss: the sum of its terms."""
        return sum(self.terms.values())


class Engine(ABC):
    """A model under DeepSpeed on this rank. All methods are collective: every rank calls them in the same order.

    Attributes:
        grid: the axes and roles of this rank.
        device: the device of its tensors.
        optimizer: the torch optimizer inside DeepSpeed's; `train_step` sets its `lr` in each group.
        head: the declaration of the output head: the labels that it reads, the terms and metrics that it returns.
        steps_begun: number of calls of `train_step`, skipped steps included; a resumed run sets it.
        kernels: names of the kernels in use that are not PyTorch's, for the log.
        context: the ranks that divide each sequence.
        padding: of rows whose length they cannot share.
        documents: the longest document of a step, which the layers read.
        gradient_sums: the fp32 gradients that products add to; None = autograd gets every gradient.
        routers: those of mixtures of experts; None = the model has none.
        built: this rank's module, and what it was built with.
        before_update: called in each step, on all ranks, between the backward pass and the optimizer; it may
            communicate. None = nothing is called.
    """

    built: BuiltModule
    kernels: tuple[str, ...] = ()
    gradient_sums: GradientSums | None = None
    routers: Routers | None = None
    before_update: Callable[[], None] | None = None

    def __init__(
        self,
        grid: Grid,
        device: torch.device,
        optimizer: torch.optim.Optimizer,
        deepspeed_engine: Any,
        head: HeadSpec,
        rng: RngStreams,
        context: ContextParallel,
        padding: RowPadding,
    ) -> None:
        self.context, self.padding = context, padding
        self.grid, self.device, self.optimizer, self.deepspeed = grid, device, optimizer, deepspeed_engine
        self.head = head
        self.steps_begun = 0
        self.documents = DocumentLimit()
        self._rng = rng
        self._read: list[float] | None = None  # the step's packed losses and its norm, once they are on the host
        self._group_tables = read_group_tables()
        if isinstance(optimizer, GuardedOptimizer):
            optimizer.should_step = self._should_step

    # ---- training ------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Forward, backward and step on this data rank's micro-batches of one global batch.

        A term of the loss is the sum over the labels of the *global* batch divided by their number: micro-batches and
        data ranks with fewer labels weigh less, and one without any contributes nothing. If the loss or the gradient
        norm is not finite, the step is skipped and nothing changes.

        Besides the layers' and DeepSpeed's own traffic: an all-reduce in host memory of an int64 label count per loss
        term, and one on the device of fp32 numbers, a loss sum per term and a sum and a weight per metric. Experts add
        one over all ranks, of E + 2 fp64 numbers per layer that has some. The host waits for the device once, for these
        numbers and the gradient norm.

        Args:
            batches: this data rank's micro-batches; their number may change from step to step.
            lr: the learning rate; parameters of `optimizer.groups` get their multiple of it.
        """
        set_group_tables(self._group_tables)
        self._rng.begin_step(self.steps_begun)
        self.steps_begun += 1
        if isinstance(self.optimizer, GuardedOptimizer):
            self.optimizer.begin_step(self.steps_begun)
        if self.gradient_sums is not None:
            self.gradient_sums.begin_step()
        if self.routers is not None:
            self.routers.begin_step(len(batches), loss_scale_of(self.deepspeed))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_FACTOR, 1.0)
        self._set_accumulation(len(batches))
        counts = self._count(batches)
        batches = self._divisible(batches)
        # DeepSpeed averages over micro-batches and over data ranks; undo both, then divide by the labels.
        parts = len(batches) * self.grid.shard.size
        scales = [parts / count if count else 0.0 for count in counts]
        skipped_before = self.deepspeed.skipped_steps
        self._read = None
        grad_norm = self._step(self._to_device(batches), scales)
        sums = self._all_sums().tolist() if self._read is None else self._read[:-1]
        losses = Losses.unpack(sums[: self.head.num_sums], counts, self.head)
        applied = self.deepspeed.skipped_steps == skipped_before and not getattr(self.optimizer, "skipped", False)
        metrics = losses.metrics
        if self.routers is not None:
            metrics |= self.routers.metrics(sums[self.head.num_sums :])
            if applied:
                self.routers.update_biases()
        return StepResult(losses.mean, grad_norm, counts[0], applied, losses.terms, metrics)

    def _set_accumulation(self, num_micro_batches: int) -> None:
        """Have DeepSpeed step after a number of micro-batches, which it counts from now on.

        Its optimizer for ZeRO-1 and 2 keeps the number that it was built with, by which it chooses the offloaded
        gradients whose norm it takes.
        """
        engine = self.deepspeed
        if num_micro_batches == engine.gradient_accumulation_steps():
            return
        engine.set_train_batch_size(num_micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        engine.micro_steps = 0
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = num_micro_batches

    def evaluate(self, batches: Sequence[MicroBatch]) -> Losses:
        """Compute the losses and metrics of all data ranks' micro-batches, without gradients.

        Besides what `_evaluate` communicates: an all-reduce over loss, and over pipeline, of what the head keeps of all
        samples, if it keeps anything.
        """
        counts = self._count(batches)
        batches = self._divisible(batches)
        sums = self._evaluate(self._to_device(batches)).tolist()
        num_samples = sum(len(next(iter(batch.values()))) for batch in batches)
        return Losses.unpack(sums, counts, self.head, self._gather_kept(num_samples) if self.head.num_kept else None)

    def _gather_kept(self, num_samples: int) -> np.ndarray:
        """Return what the head has kept of all data ranks' samples, (samples, num_kept) in their order.

        Collective over loss and pipeline: each rank that has the head fills its own place among zeros.

        Args:
            num_samples: number of this data rank's samples.
        """
        grid = self.grid
        everyone = torch.zeros(grid.batch.size, num_samples, self.head.num_kept, device=self.device)
        for head in (one for one in self.deepspeed.module.modules() if isinstance(one, OutputHead)):
            if grid.context.rank == 0:  # the others have no labels of samples
                everyone[grid.batch.rank] = torch.cat(head.kept)
            head.kept.clear()
        gathered = all_reduce_(all_reduce_(everyone, grid.loss), grid.pipeline)
        return gathered.flatten(0, 1).cpu().numpy()

    @property
    def can_overflow(self) -> bool:
        """True under fp16's dynamic loss scale, where a skipped step is normal."""
        return bool(getattr(getattr(self.deepspeed.optimizer, "loss_scaler", None), "dynamic", False))

    def outputs(self, batch: MicroBatch) -> dict[str, Tensor] | None:
        """Return the predictions by name, (B, ...) fp32 on CPU; None except on ranks of the last pipeline stage."""
        found = self._outputs(self.padding.pad(batch))
        return None if found is None else self.padding.cut(found, batch)

    @abstractmethod
    def _outputs(self, batch: MicroBatch) -> dict[str, Tensor] | None:
        """Return the predictions by name for a batch of lengths that the ranks can share."""

    @abstractmethod
    def _step(self, batches: Sequence[MicroBatch], scales: Sequence[float]) -> float:
        """Run forward, backward and optimizer on this rank's micro-batches; return the gradient norm before clipping.

        `read_norm` is called between the backward pass and the optimizer.

        Args:
            batches: micro-batches on the device.
            scales: for each term, what a micro-batch's sum is multiplied by before it is differentiated.
        """

    @abstractmethod
    def run_alone(self, batch: MicroBatch) -> Tensor:
        """Run forward and backward pass of a micro-batch without DeepSpeed; return what the forward pass gives.

        Random streams start as in the coming step. Gradients accumulate in the module's parameters, and are not reduced
        over data ranks. The result is the packed losses of this rank. A pipeline stage runs alone: it gets hidden
        states that are drawn at random, and returns its own. Collective over tensor and context, and over the ranks
        that divide experts. Below ZeRO-3.

        Args:
            batch: this data rank's, in host memory.
        """

    def _begin_alone(self, batch: MicroBatch) -> MicroBatch:
        """Prepare for `run_alone`; return its micro-batch on the device."""
        set_group_tables(self._group_tables)
        self._rng.begin_step(self.steps_begun)
        if self.routers is not None:
            self.routers.begin_step(1, 1.0)
        (moved,) = self._to_device(self._divisible([batch]))
        return moved

    @abstractmethod
    def _collect(self) -> Tensor:
        """Return `HeadSpec.pack`'s tensor of the step, (num_sums,), summed over its micro-batches and ranks.

        Collective over loss, and over pipeline.
        """

    def read_norm(self, norm: Tensor) -> Tensor:
        """Read the step's losses and its gradient norm, a scalar, in one transfer; return the norm on the host.

        Collective over loss, and over pipeline; over the world if there are mixtures of experts.
        """
        if self.before_update is not None:
            self.before_update()
        sums = self._all_sums()
        if norm.device != sums.device:  # offloaded gradients leave it in host memory
            sums = sums.cpu()
        self._read = torch.cat([sums, norm.reshape(1)]).tolist()
        return torch.tensor(self._read[-1], dtype=norm.dtype)

    def _all_sums(self) -> Tensor:
        """Return `_collect`'s sums of the step, and then those of the routers."""
        sums = self._collect()
        return sums if self.routers is None else torch.cat([sums, self.routers.collect(sums.device)])

    def _should_step(self) -> bool:
        """Return whether the step's loss and norm are finite, the same on all ranks."""
        assert self._read is not None, "the optimizer steps before the gradient norm is known"
        return all(math.isfinite(value) for value in (*self._read[: len(self.head.terms)], self._read[-1]))

    @abstractmethod
    def _evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Return `HeadSpec.pack`'s tensor, (num_sums,), summed over batches and data ranks, on all ranks."""

    def _count(self, batches: Sequence[MicroBatch]) -> tuple[int, ...]:
        """Return the number of labels per loss term in the global batch. Collective over the world, in host memory.

        Args:
            batches: this data rank's micro-batches of it, in host memory.

        Raises:
            ValueError: `count_labels` does not count each term.
            DataError: the head's `check` refuses a micro-batch.
        """
        for batch in batches:
            self.head.check(batch)
        counts = torch.stack([self.head.count_labels(self.head.labels_in(batch)) for batch in batches]).sum(0)
        if counts.shape != (len(self.head.terms),):
            raise ValueError(f"count_labels returned {tuple(counts.shape)} for the terms {', '.join(self.head.terms)}")
        if self.grid.batch.size > 1:
            counts = all_reduce_(counts if self.grid.is_first_of_batch else torch.zeros_like(counts), self.grid.host)
        return tuple(counts.tolist())

    def _divisible(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """Return micro-batches of lengths that the ranks can share, with where their documents begin."""
        padded = [self.padding.pad(batch) for batch in batches]
        for given, batch in zip(batches, padded):
            self.head.check_parts(given, batch, self.context)
        return with_document_bounds(padded, self.documents)

    def _empty_sums(self) -> Tensor:
        """Return zeros of the shape of `HeadSpec.pack`, to add micro-batches to."""
        return torch.zeros(self.head.num_sums, dtype=torch.float32, device=self.device)

    def _to_device(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the columns on the device, with those that the head derives from them on the host."""
        return [self._move(self.head.with_own_labels(batch, self.context)) for batch in batches]

    def _move(self, batch: MicroBatch) -> MicroBatch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    # ---- parameters ----------------------------------------------------------------------------------------------

    @abstractmethod
    def local_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this pipeline stage's parameters, each once, with their names in the full model."""

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Return a context in which a parameter's data is this rank's shard. Collective under ZeRO-3.

        Its ranks are those of `Grid.shard_of`.
        """
        return nullcontext()

    def count_params(self) -> int:
        """Count the model's parameters, tied ones once, without vocabulary padding. Collective over pipeline.

        Weights that are no parameters are not counted.
        """
        entries = [entry for stage in self.inventory() for entry in stage]
        return sum(spec.numel for name, spec, _ in entries if not is_untrained(name))

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the model's parameters in order: the full tensor without padding on global rank 0, None elsewhere.

        Collective over the world. At any time rank 0 holds one full tensor, the others their shard. Each tensor is
        gathered over the tensor ranks of its pipeline stage and sent to rank 0.

        Args:
            names: the parameters to yield; None = all.
        """
        return self.full_tensors(lambda parameter: parameter.detach(), names)

    def full_tensors(
        self, of: Callable[[nn.Parameter], Tensor], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yield tensors of the parameters' shapes and dtypes, such as gradients, as `full_parameters` does."""
        for name, _, full in self._full_parts(of, names, (), {}):
            yield name, full

    def full_parts(
        self, by_expert: Collection[str], masters: Mapping[str, Callable[[nn.Parameter], Tensor]] = MappingProxyType({})
    ) -> Iterator[tuple[str, int | None, Tensor | None]]:
        """Yield the model's parameters as `full_parameters` does, but some of them one expert at a time.

        Then a rank holds one expert more than its shard. Collective over the world.

        Args:
            by_expert: parameters of experts that are yielded as (name, index of the expert, tensor without the dim of
                the experts); of others the index is None.
            masters: functions that return this rank's shard of a parameter in fp32, collective over shard; the
                parameters under these names are yielded in fp32.
        """
        return self._full_parts(lambda parameter: parameter.detach(), None, by_expert, masters)

    def _full_parts(
        self,
        of: Callable[[nn.Parameter], Tensor],
        names: Collection[str] | None,
        by_expert: Collection[str],
        masters: Mapping[str, Callable[[nn.Parameter], Tensor]],
    ) -> Iterator[tuple[str, int | None, Tensor | None]]:
        grid = self.grid
        parameters = dict(self.local_parameters())
        for stage, entries in enumerate(self.inventory()):
            is_here, source = grid.coords.pipeline == stage, grid.layout.rank_of(pipeline=stage)
            for name, spec, dtype in entries:
                if names is not None and name not in names:
                    continue
                each = name in by_expert
                experts: Sequence[int | None] = range(spec.shape[0]) if each else (None,)
                shape = spec.shape[1:] if each else spec.shape
                master = masters[name](parameters[name]) if name in masters and is_here else None
                dtype = torch.float32 if name in masters else dtype
                with self.gathered(parameters[name]) if is_here else nullcontext():
                    holds = is_here and grid.replica_of(spec).rank == 0
                    shard = None if not holds else of(parameters[name]) if master is None else master
                    for expert in experts:
                        full = None if shard is None else gather_part(shard, spec, grid.model_axes, expert)
                        if source != 0:
                            full = send_to_rank_0(full, shape, dtype, source, grid.rank, self.device)
                        yield name, expert, full if grid.rank == 0 else None

    def inventory(self) -> list[list[tuple[str, ParamSpec, torch.dtype]]]:
        """Return name, declaration and dtype of each pipeline stage's parameters. Collective over pipeline.

        A tied parameter is in the list of the first stage that holds it.
        """
        own_stage = [(name, spec_of(parameter), parameter.dtype) for name, parameter in self.local_parameters()]
        pipeline = self.grid.pipeline
        stages = gather_objects(own_stage, pipeline.group) if pipeline.size > 1 else [own_stage]
        seen: set[str] = set()
        unique = []
        for stage in stages:
            unique.append([entry for entry in stage if entry[0] not in seen])
            seen.update(entry[0] for entry in stage)
        return unique


def weights_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and tensors of a module's parameters, and then of its other weights.

    The latter are the tensors that a submodule's `untrained` returns. DeepSpeed and optimizers do not know them, so
    that they keep their dtype and are never divided.
    """
    yield from module.named_parameters()
    for name, part in module.named_modules():
        find = getattr(part, "untrained", None)
        for own, tensor in find().items() if find is not None else ():
            yield f"{name}.{own}", tensor
