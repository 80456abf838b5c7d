"""The build context: everything besides its config that a layer needs when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ds.layers.documents import DocumentLimit
from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.recompute import Recompute
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class BuildContext:
    """Parallel axes, random streams and implementations that layers are built with. The default is a single process.

    Attributes:
        tp: tensor and sequence parallelism.
        rng: random streams for dropout; None = no dropout.
        recompute: which activations are recomputed in the backward pass.
        compiled: whether torch.compile fuses the operations of a block between its matrix products.
        kernels: implementations of norms, gated activations and attention.
        documents: the longest document of a step, where an engine sets it.
    """

    tp: TensorParallel = field(default_factory=TensorParallel)
    rng: RngStreams | None = None
    recompute: Recompute = field(default_factory=Recompute)
    compiled: bool = False
    kernels: Kernels = REFERENCE
    documents: DocumentLimit = field(default_factory=DocumentLimit)
