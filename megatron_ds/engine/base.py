"""What both adapters offer, and what they share: the loss of a global batch, and parameters by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds.engine.optimizer import GuardedAdamW
from megatron_ds.layers.cross_entropy import IGNORE_INDEX
from megatron_ds.layers.param_spec import ParamSpec, spec_of
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Grid
from megatron_ds.parallel.random import RngStreams

MicroBatch = Mapping[str, Tensor]
"""Columns by name, each (B, ...): those that the model's first stage takes, as far as there are, and its labels."""

ShardReader = Callable[[str, ParamSpec, int, int], Tensor]
"""(name, declaration, tensor rank, tensor size) -> this rank's share of a parameter's value."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: the sum, over the model's terms, of the mean over what the global batch has labels of: tokens, sequences.
        grad_norm: L2 norm of the whole model's gradient before clipping.
        tokens: labelled tokens in the global batch: labels of the first term.
        applied: False where the step was skipped: the loss or the gradient norm is not finite, or fp16 overflowed.
        terms: the loss's terms by the column of their labels.
    """

    loss: float
    grad_norm: float
    tokens: int
    applied: bool
    terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """Of some batches, over all data ranks: a sum and the number of labels for each of the model's terms."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            tuple(mine + theirs for mine, theirs in zip(self.sums, other.sums)),
            tuple(mine + theirs for mine, theirs in zip(self.counts, other.counts)),
        )

    @property
    def terms(self) -> tuple[float, ...]:
        """Each term's mean; 0 where there are no labels."""
        return tuple(total / count if count else 0.0 for total, count in zip(self.sums, self.counts))

    @property
    def mean(self) -> float:
        """The loss: the terms added up."""
        return sum(self.terms)


class Engine(ABC):
    """A model under DeepSpeed on this rank. All methods are collective: every rank calls them in the same order.

    Attributes:
        grid: where this rank sits.
        device: where its tensors live.
        optimizer: the torch optimizer inside DeepSpeed's; its `lr` is set from outside before each step.
        labels: the columns that the loss compares with, one term each.
        steps_begun: how many steps were asked for, skipped ones too; a resumed run sets it.
        kernels: for people: what is computed by other libraries than PyTorch.
    """

    kernels: tuple[str, ...] = ()

    def __init__(
        self,
        grid: Grid,
        device: torch.device,
        optimizer: torch.optim.Optimizer,
        deepspeed_engine: Any,
        labels: tuple[str, ...],
        rng: RngStreams,
    ) -> None:
        self.grid, self.device, self.optimizer, self.deepspeed = grid, device, optimizer, deepspeed_engine
        self.labels = labels
        self.steps_begun = 0
        self._rng = rng
        if isinstance(optimizer, GuardedAdamW):
            optimizer.should_step = self._should_step

    # ---- training ------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Forward, backward and step on this data rank's micro-batches of one global batch.

        A term of the loss is the sum over the labels of the *global* batch divided by their number: micro-batches and
        data ranks with fewer labels weigh less, and one without any contributes nothing. Where the loss or the
        gradient norm is not finite, nothing is changed. Communicates an integer and a number a term beyond what the
        layers and DeepSpeed do.
        """
        self._rng.begin_step(self.steps_begun)
        self.steps_begun += 1
        if isinstance(self.optimizer, GuardedAdamW):
            self.optimizer.begin_step()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        counts = self._count(batches)
        # DeepSpeed averages over micro-batches and over data ranks; undo both, then divide by the labels.
        parts = len(batches) * self.grid.data.size
        scales = torch.tensor([parts / count if count else 0.0 for count in counts], device=self.device)
        skipped_before = self.deepspeed.skipped_steps
        sums, grad_norm = self._step([self._to_device(batch) for batch in batches], scales)
        losses = Losses(tuple(sums.tolist()), counts)
        applied = self.deepspeed.skipped_steps == skipped_before and not getattr(self.optimizer, "skipped", False)
        return StepResult(losses.mean, grad_norm, counts[0], applied, dict(zip(self.labels, losses.terms)))

    def evaluate(self, batches: Sequence[MicroBatch]) -> Losses:
        """Of all data ranks' micro-batches, without gradients."""
        counts = self._count(batches)
        return Losses(tuple(self._evaluate([self._to_device(batch) for batch in batches]).tolist()), counts)

    @property
    def can_overflow(self) -> bool:
        """Whether skipping a step for a gradient that is not finite is in the course of things: fp16's loss scale."""
        return bool(getattr(getattr(self.deepspeed.optimizer, "loss_scaler", None), "dynamic", False))

    @abstractmethod
    def outputs(self, batch: MicroBatch) -> dict[str, Tensor] | None:
        """What the model predicts, by name, (B, ...) fp32 on CPU, where this rank has the last stage; else None."""

    @abstractmethod
    def _step(self, batches: Sequence[MicroBatch], scales: Tensor) -> tuple[Tensor, float]:
        """-> (sums of losses over all data ranks, (terms,), on every rank; gradient norm before clipping).

        What is differentiated is the sum of a micro-batch's losses, each times its scale.
        """

    @abstractmethod
    def _should_step(self) -> bool:
        """Whether what is known of the step under way is finite; the same on all ranks. Collective."""

    @abstractmethod
    def _evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """-> sums of losses over all data ranks, (terms,), on every rank."""

    def _count(self, batches: Sequence[MicroBatch]) -> tuple[int, ...]:
        """Labels of each term in the global batch that these are this data rank's share of."""
        mine = [sum(_count_labels(batch[name]) for batch in batches) for name in self.labels]
        counts = all_reduce_(torch.tensor(mine, dtype=torch.int64, device=self.device), self.grid.data)
        return tuple(counts.tolist())

    def _labels_of(self, batch: MicroBatch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.labels}

    def _to_device(self, batch: MicroBatch) -> MicroBatch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    # ---- parameters ----------------------------------------------------------------------------------------------

    @abstractmethod
    def local_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This pipeline stage's parameters under their names in the whole model, each once."""

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Within it, the parameter's data is this tensor rank's whole share. Collective over the data axis."""
        return nullcontext()

    def count_params(self) -> int:
        """Parameters of the whole model, tied ones once, without vocabulary padding. Collective."""
        return sum(spec.numel for stage in self.inventory() for _, spec, _ in stage)

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter of the model in order, or the named ones, whole and without padding: on global rank 0, and
        None elsewhere.

        Collective; at any time rank 0 holds one whole tensor, the others their share. A tensor is gathered over the
        tensor ranks of its stage and sent to rank 0.
        """
        return self.full_tensors(lambda parameter: parameter.detach(), names)

    def full_tensors(
        self, of: Callable[[nn.Parameter], Tensor], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Like `full_parameters`, for something that each rank has of its parameters' shape and dtype: a gradient."""
        grid = self.grid
        parameters = dict(self.local_parameters())
        for stage, entries in enumerate(self.inventory()):
            source = grid.layout.rank_of(stage, 0, 0)
            for name, spec, dtype in entries:
                if names is not None and name not in names:
                    continue
                whole: Tensor | None = None
                if grid.coords.pipeline == stage:
                    with self.gathered(parameters[name]):
                        if grid.coords.data == 0:
                            whole = gather_shard(of(parameters[name]), spec, grid)
                if source != 0:
                    whole = _send_to_rank_0(whole, spec, dtype, source, grid.rank, self.device)
                yield name, whole if grid.rank == 0 else None

    def inventory(self) -> list[list[tuple[str, ParamSpec, torch.dtype]]]:
        """Stage by stage: name, declaration, dtype of the parameters that it is the first to hold. Collective."""
        mine = [(name, spec_of(parameter), parameter.dtype) for name, parameter in self.local_parameters()]
        stages: list[Any] = [mine]
        if self.grid.pipeline.size > 1:
            stages = [None] * self.grid.pipeline.size
            dist.all_gather_object(stages, mine, group=self.grid.pipeline.group)
        seen: set[str] = set()
        unique = []
        for stage in stages:
            unique.append([entry for entry in stage if entry[0] not in seen])
            seen.update(entry[0] for entry in stage)
        return unique


def _count_labels(column: Tensor) -> int:
    """Of integers those that are not ignored; all of what are no ids."""
    return column.numel() if column.is_floating_point() else int((column != IGNORE_INDEX).sum())


def gather_shard(share: Tensor, spec: ParamSpec, grid: Grid, to: int = 0) -> Tensor | None:
    """Shares -> the whole tensor without padding on tensor rank `to`, None on the others.

    Of a share that several ranks hold the first one's is taken.
    """
    axis = grid.tensor
    if spec.split_dim is None or axis.size == 1:
        return share if axis.rank == to else None
    parts = [torch.empty_like(share) for _ in range(axis.size)] if axis.rank == to else None
    dist.gather(share.contiguous(), parts, dst=axis.ranks[to], group=axis.group)
    if parts is None:
        return None
    different = [part for rank, part in enumerate(parts) if spec.holds_first(rank, axis.size)]
    return torch.cat(different, dim=spec.split_dim).narrow(spec.split_dim, 0, spec.shape[spec.split_dim])


def _send_to_rank_0(
    whole: Tensor | None, spec: ParamSpec, dtype: torch.dtype, source: int, rank: int, device: torch.device
) -> Tensor | None:
    if rank == source:
        assert whole is not None
        dist.send(whole.contiguous(), dst=0)
    elif rank == 0:
        whole = torch.empty(spec.shape, dtype=dtype, device=device)
        dist.recv(whole, src=source)
        return whole
    return None
