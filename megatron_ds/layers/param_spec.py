"""One declaration per parameter: its whole shape, how it is split, how it starts, whether it decays.

Parameter flags for DeepSpeed, initialisation, weight decay, Hugging Face import and export all read this declaration,
so they cannot disagree. It stays on the tensor when ZeRO-3 flattens the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor, nn

from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.random import derive_seed


@dataclass(frozen=True)
class ParamSpec:
    """What a parameter is, whatever the layout.

    Attributes:
        shape: the whole (logical) shape, without vocabulary padding.
        split_dim: the dim divided over the tensor axis; None = every tensor rank holds all of it.
        std: standard deviation of its normal initialisation; None = not normal.
        bound: it starts uniform within ±bound, where `std` is None.
        fill: the constant that it starts from where both are None.
        decay: whether Adam's weight decay applies (not to biases and norms).
        units: how many things that cannot be cut `split_dim` is made of (key and value heads); None = any cut will do.
            An axis longer than they divide holds fewer shares than it has ranks, each on several neighbours.
    """

    shape: tuple[int, ...]
    split_dim: int | None = None
    std: float | None = None
    fill: float = 0.0
    decay: bool = True
    units: int | None = None
    bound: float | None = None

    def shares(self, size: int) -> int:
        """How many different shares `size` ranks hold: as many, unless `units` divide into fewer."""
        return gcd(self.units, size) if self.units is not None else size

    def holds_first(self, rank: int, size: int) -> bool:
        """Whether a rank is the first of those that hold its share."""
        return rank % (size // self.shares(size)) == 0

    def padded_shard(self, size: int) -> int:
        """Length of `split_dim` on each of `size` ranks, rounded up: the rest is padding on the last ranks."""
        assert self.split_dim is not None
        return -(-self.shape[self.split_dim] // self.shares(size))

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape on each of `size` tensor ranks, padding included."""
        if self.split_dim is None:
            return self.shape
        return (*self.shape[: self.split_dim], self.padded_shard(size), *self.shape[self.split_dim + 1 :])

    def local_range(self, rank: int, size: int) -> tuple[int, int]:
        """[start, stop) along `split_dim` of the logical tensor that a tensor rank holds; empty if all is padding."""
        if self.split_dim is None:
            return 0, 0
        share, whole = self.padded_shard(size), self.shape[self.split_dim]
        index = rank * self.shares(size) // size
        return min(index * share, whole), min((index + 1) * share, whole)

    @property
    def numel(self) -> int:
        return prod(self.shape)


def make_parameter(spec: ParamSpec, axis: Axis) -> nn.Parameter:
    """Allocate a rank's share, unfilled, in torch's default dtype and device.

    Sets `tensor_model_parallel` on shards only, and of a share that several ranks hold on the first one's: DeepSpeed's
    gradient norm counts flagged parameters everywhere, and others on the first rank of a tensor group.
    """
    parameter = nn.Parameter(torch.empty(spec.local_shape(axis.size)))
    parameter.spec = spec  # type: ignore[attr-defined]
    if spec.split_dim is not None and axis.size > 1 and spec.holds_first(axis.rank, axis.size):
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: Tensor) -> ParamSpec:
    """The declaration of a parameter. Every parameter of a model core has one."""
    return parameter.spec  # type: ignore[attr-defined]


def counts_here(parameter: Tensor, axis: Axis) -> bool:
    """Whether this tensor rank's part of a parameter counts in a sum over the whole model: DeepSpeed's rule."""
    return axis.rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def pad_shard(share: Tensor, spec: ParamSpec, size: int) -> Tensor:
    """Append the zero padding that makes a logical slice as large as every rank's share."""
    if spec.split_dim is None:
        return share
    missing = spec.padded_shard(size) - share.shape[spec.split_dim]
    if missing == 0:
        return share
    padding = list(share.shape)
    padding[spec.split_dim] = missing
    return torch.cat([share, share.new_zeros(padding)], dim=spec.split_dim)


def initial_shard(name: str, spec: ParamSpec, seed: int, rank: int, size: int) -> Tensor:
    """A rank's share of a parameter's initial value, fp32 on CPU, padding included.

    The whole tensor is drawn from a generator seeded by (seed, name) and then cut, so the weights depend on neither
    layout nor the order in which parameters are filled. Holds one whole tensor at a time.
    """
    generator = torch.Generator().manual_seed(derive_seed("init", seed, name))
    if spec.std is not None:
        whole = torch.empty(spec.shape).normal_(0.0, spec.std, generator=generator)
    elif spec.bound is not None:
        whole = torch.empty(spec.shape).uniform_(-spec.bound, spec.bound, generator=generator)
    else:
        whole = torch.full(spec.shape, spec.fill)
    if spec.split_dim is None:
        return whole
    start, stop = spec.local_range(rank, size)
    return pad_shard(whole.narrow(spec.split_dim, start, stop - start), spec, size)
