"""Cross entropy over a vocabulary divided over the tensor axis: its arguments, PyTorch's formula, and small inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.layers.kernels.reference import Random
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Axis


@dataclass(frozen=True)
class LogitFinish:
    """The change of the logits before the softmax: multiply by `multiplier`, then bound by `softcap`.

    softcap * tanh(logits / softcap) keeps them within +-softcap (Gemma 2, 2024); None = unbounded.
    """

    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Map fp32 logits of the matmul to the final logits; may work in place."""
        if self.multiplier != 1.0:
            raw = raw * self.multiplier
        return torch.tanh(raw / self.softcap) * self.softcap if self.softcap is not None else raw

    def gradient(self, grad: Tensor, finished: Tensor | None) -> Tensor:
        """Map the gradient of the final logits to that of the raw ones. `finished`: final logits, for a softcap."""
        if self.softcap is not None:
            assert finished is not None
            grad = grad * (1.0 - (finished / self.softcap).square())
        return grad * self.multiplier if self.multiplier != 1.0 else grad


@dataclass(frozen=True)
class LossCall:
    """The arguments of a `CrossEntropy` besides logits (tokens, columns) and labels (tokens,).

    Attributes:
        start: the token id of the first column.
        valid: the number of columns that are not padding; the others take no part, and their gradient is zero.
        axis: the tensor axis, over which the vocabulary is divided.
        finish: the change of the logits before the softmax.
        scale: factor of the gradient.
        wants_gradient: False = the contents of the logits are undefined afterwards.
    """

    start: int
    valid: int
    axis: Axis = field(default_factory=Axis)
    finish: LogitFinish = LogitFinish()
    scale: float = 1.0
    wants_gradient: bool = True


CrossEntropy = Callable[[Tensor, Tensor, LossCall], tuple[Tensor, Tensor]]
"""(logits, labels, call) -> each token's loss, fp32 (tokens,); the gradient of their sum, in the logits' memory.

The logits are this rank's columns; labels are ids in the full vocabulary, every one of a token. Collective over tensor:
two fp32 all-reduces, of (tokens,) maxima and of (2, tokens) sums.
"""


def reference_cross_entropy(logits: Tensor, labels: Tensor, call: LossCall) -> tuple[Tensor, Tensor]:
    """Compute a `CrossEntropy` in fp32; fp32 logits without a `finish` are only changed in place."""
    raw = logits[:, : call.valid]
    final = call.finish(raw.float())
    finished = final.clone() if call.finish.softcap is not None and call.wants_gradient else None
    peaks = final.amax(dim=-1) if call.valid else final.new_full(labels.shape, -torch.inf)
    all_reduce_(peaks, call.axis, dist.ReduceOp.MAX)
    final = final.sub_(peaks[:, None])

    here = (labels >= call.start) & (labels < call.start + call.valid)
    columns = (labels - call.start).masked_fill(~here, 0)[:, None]
    picked = final.gather(1, columns).squeeze(1) if call.valid else torch.zeros_like(peaks)
    exps = final.exp_()
    sums = torch.stack([exps.sum(dim=-1), picked.masked_fill(~here, 0.0)])
    all_reduce_(sums, call.axis)
    losses = sums[0].log() - sums[1]
    if call.wants_gradient:
        grad = exps.div_(sums[0][:, None])
        if call.valid:
            grad.scatter_add_(1, columns, -here.to(grad.dtype)[:, None])
        grad = call.finish.gradient(grad, finished)
        raw.copy_(grad.mul_(call.scale) if call.scale != 1.0 else grad)
        logits[:, call.valid :] = 0
    return losses, logits


def wide_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `CrossEntropy` with more columns than a GPU's kernel reads at a time, and padding."""
    logits = random(4, 20_032)
    return logits, torch.tensor([0, 7, 16_384, 19_999], device=logits.device), LossCall(0, 20_000)


def capped_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `CrossEntropy` with bounded logits."""
    logits = random(4, 50)
    labels = torch.tensor([0, 1, 25, 49], device=logits.device)
    return logits, labels, LossCall(0, 50, finish=LogitFinish(0.5, 2.0), scale=4.0)
