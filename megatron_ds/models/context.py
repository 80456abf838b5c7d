"""The build context: everything besides its config that a layer needs when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.layers.documents import DocumentLimit
from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.recompute import Recompute
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class BuildContext:
    """Parallel axes, random streams and implementations that layers are built with. The default is a single process.

    Attributes:
        tp: tensor and sequence parallelism.
        experts: expert parallelism, of the same tensor ranks; None = every rank has all experts.
        rng: random streams for dropout; None = no dropout.
        recompute: which activations are recomputed in the backward pass.
        compiled: whether torch.compile fuses the operations of a block between its matrix products.
        compiler: backend of torch.compile.
        kernels: implementations of norms, gated activations and attention.
        documents: the longest document of a step, where an engine sets it.
        mlp_tile_tokens: tokens of a tile of dense feed-forward layers; None = they are computed whole.
        routers: the settings that the routers of all layers share.
    """

    tp: TensorParallel = field(default_factory=TensorParallel)
    rng: RngStreams | None = None
    recompute: Recompute = field(default_factory=Recompute)
    compiled: bool = False
    compiler: str | Callable[..., Any] = "inductor"
    kernels: Kernels = REFERENCE
    documents: DocumentLimit = field(default_factory=DocumentLimit)
    experts: ExpertParallel | None = None
    mlp_tile_tokens: int | None = None
    routers: RouterSettings = field(default_factory=RouterSettings)
