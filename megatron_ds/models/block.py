"""The transformer block of decoders."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from megatron_ds.layers.attention import CausalSelfAttention
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.norm import Norm
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models.config import DecoderConfig
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Placement:
    """Where a stage runs: the tensor axis, the random streams, and what is recomputed. The default is one process."""

    tp: TensorParallel = field(default_factory=TensorParallel)
    rng: RngStreams | None = None
    recompute: Recompute = field(default_factory=Recompute)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the second of a wire's tensors, if any, is the key mask.

    Hidden states (S, B, H), or (S/t, B, H) under sequence parallelism. A micro-batch moves, forward and backward
    together, 8 SBH(t-1)/t elements by all-reduces; or 10 SBH(t-1)/t by all-gathers and reduce-scatters.
    """

    def __init__(self, config: DecoderConfig, layer: int, rotary: RotaryTable | None, at: Placement) -> None:
        super().__init__()
        self.recompute = at.recompute
        self.attention_norm = Norm(config.hidden_size, config.norm, config.norm_eps, at.tp)
        self.attention = CausalSelfAttention(config.attention(layer), at.tp, rotary, at.recompute, at.rng)
        self.mlp_norm = Norm(config.hidden_size, config.norm, config.norm_eps, at.tp)
        self.mlp = MLP(
            config.hidden_size,
            config.ffn_size,
            at.tp,
            activation=config.activation,
            gated=config.gated,
            bias=config.mlp_bias,
            std=config.init_std,
            out_std=config.out_std,
        )
        self.dropout = HiddenDropout(config.residual_dropout, at.rng, at.tp.splits_sequence)

    def forward(self, wire: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = wire
        return (self.recompute.run("full", self._block, hidden, *rest), *rest)

    def _block(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), key_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
