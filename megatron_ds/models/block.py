"""The transformer block of decoders."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from megatron_ds.layers.attention import CausalSelfAttention
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import scaled
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.norm import Norm
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models.config import DecoderConfig
from megatron_ds.models.stages import Wire
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Placement:
    """Where a stage runs: the tensor axis, the random streams, and what is recomputed. The default is one process."""

    tp: TensorParallel = field(default_factory=TensorParallel)
    rng: RngStreams | None = None
    recompute: Recompute = field(default_factory=Recompute)


class DecoderBlock(nn.Module):
    """Attention and MLP around a residual stream; the second of a wire's tensors, if any, is the key mask.

    Where the norms stand and what the MLP starts from are the config's: with the defaults x + attention(norm(x)), then
    x + mlp(norm(x)).

    Hidden states (S, B, H), or (S/t, B, H) under sequence parallelism. A micro-batch moves, forward and backward
    together, 8 SBH(t-1)/t elements by all-reduces; or 10 SBH(t-1)/t by all-gathers and reduce-scatters.
    """

    def __init__(self, config: DecoderConfig, layer: int, rotary: RotaryTable | None, at: Placement) -> None:
        super().__init__()
        self.config, self.recompute = config, at.recompute
        self.attention_norm, self.attention_output_norm = self._norms(at)
        self.attention = CausalSelfAttention(config.attention(layer), at.tp, rotary, at.recompute, at.rng)
        self.mlp_norm, self.mlp_output_norm = self._norms(at)
        if config.shared_norm:
            self.mlp_norm = None
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

    def _norms(self, at: Placement) -> tuple[Norm | None, Norm | None]:
        """The norm at the input of attention or MLP, and that of its output, or of the sum with it."""
        config = self.config

        def norm(*places: str) -> Norm | None:
            return Norm(config.hidden_size, config.norm, at.tp) if config.norm_place in places else None

        return norm("input", "both"), norm("output", "both", "sum")

    def forward(self, wire: Wire) -> Wire:
        hidden, *rest = wire
        return (self.recompute.run("full", self._block, hidden, *rest), *rest)

    def _block(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        normal = _apply(self.attention_norm, x)
        attended = self.attention(normal, key_mask)
        if self.config.parallel:
            start = normal if self.config.shared_norm else _apply(self.mlp_norm, x)
            return x + self._weighed(attended) + self._weighed(self.mlp(start))
        x = self._add(x, attended, self.attention_output_norm)
        return self._add(x, self.mlp(_apply(self.mlp_norm, x)), self.mlp_output_norm)

    def _add(self, x: Tensor, change: Tensor, norm: Norm | None) -> Tensor:
        if self.config.norm_place == "sum":
            return _apply(norm, x + self._weighed(change))
        return x + self._weighed(_apply(norm, change))

    def _weighed(self, change: Tensor) -> Tensor:
        return scaled(self.dropout(change), self.config.residual_multiplier, in_dtype=False)


def _apply(norm: Norm | None, x: Tensor) -> Tensor:
    return norm(x) if norm is not None else x
