"""A stack of blocks in mathematical terms, and the shapes of its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from megatron_ds.config import ModelShape
from megatron_ds.layers.alibi import Alibi
from megatron_ds.layers.attention_shape import AttentionShape, QueryTemperature
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.mlp import MLPShape
from megatron_ds.layers.moe.shape import MoEShape, RouterShape
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.relative_bias import RelativePositions
from megatron_ds.layers.rotary import BY_LENGTH, RotaryConfig
from megatron_ds.monitor import model_flops_per_token

NORM_PLACES = ("input", "output", "both", "sum")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixtures of experts that are feed-forward layers of a stack. Activation and norms are those of the stack.

    Attributes:
        router: the choice of experts in each of these layers.
        ffn_size: inner width of one expert.
        layers: indices of the blocks that have experts, in order; the others have a dense layer.
        limit, bias, shared_gate, aux_loss: see `MoEShape`.
        shared_ffn_size: sum of the inner widths of the shared experts; 0 = no such experts.
    """

    router: RouterShape
    ffn_size: int
    layers: tuple[int, ...]
    limit: float | None = None
    bias: bool = False
    shared_ffn_size: int = 0
    shared_gate: bool = False
    aux_loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of blocks. Every option is independent of the others; the defaults are those of most decoders.

    Attributes:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: global sizes.
        norm: of hidden states.

        causal: a position attends to no later position.
        cross_attention: between attention and MLP, each block attends to the hidden states of another stack.
        rotary: frequencies for each layer; None = no rotation in that layer.
        alibi: biases by distance; None = no such biases.
        relative: learned biases by distance, one table for all blocks; None = no such biases.

        norm_place: position of a block's norms: "input" (of attention and MLP), "output" (before the residual sum),
            "both", or "sum" (after the residual sum). `first_norm`: the first block has one at attention's input too.
        parallel: attention and MLP both read the block's input; `shared_norm`: through one norm.
        residual_multiplier: factor of the outputs of attention and MLP.

        qkv_bias, attention_out_bias, mlp_bias: which projections have biases.
        qk_norm: norm of queries and keys, before the rotation or `qk_norm_after_rotary`; `qk_norm_across_heads`: over
            all heads at once; `qk_norm_each_head`: by a weight for each head.
        query_temperature: growth of the scores with the query's position; None = no growth.
        attention_scale: of the scores; None = 1/sqrt(head_dim). `scale_by_layer`: divided by the layer's number from 1.
        attention_softcap: bound of the scores; None = no bound.
        attention_sinks: each head of self-attention has a learned score without a value in its softmax.
        windows: for each layer, a query sees the keys less than this far from it, its own included, which are on both
            sides where it is not causal; None = all. Empty = all in every layer.

        activation: a name in `layers.mlp.ACTIVATIONS`, or in `LEARNED` where not gated; `gated`: act(gate) * up instead
            of act(up).
        moe: the mixtures of experts among the feed-forward layers; None = all are dense.

        shared_blocks: all blocks have the parameters of the first one (Lan et al. 2020).

        attention_dropout, residual_dropout, ffn_dropout: probabilities; the last inside the MLP.
        attention_out_dropout: that of self-attention's output; None = `residual_dropout`, as of all other outputs.
        init_std: of all weights; projections into the residual stream get init_std / sqrt(2 L) with
            `scaled_residual_init` (Radford et al. 2019). With `fan_in_init`, it is a factor of 1/sqrt(inputs) instead,
            and queries have 1/sqrt(head_dim) in their weights, not in the scores (Raffel et al. 2020).
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm: NormStyle

    causal: bool = True
    cross_attention: bool = False
    rotary: tuple[RotaryConfig | None, ...] = ()
    alibi: Alibi | None = None
    relative: RelativePositions | None = None

    norm_place: str = "input"
    first_norm: bool = True
    parallel: bool = False
    shared_norm: bool = False
    residual_multiplier: float = 1.0

    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: NormStyle | None = None
    qk_norm_across_heads: bool = False
    qk_norm_each_head: bool = False
    qk_norm_after_rotary: bool = False
    query_temperature: QueryTemperature | None = None
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    attention_sinks: bool = False
    windows: tuple[int | None, ...] = ()

    activation: str
    gated: bool = False
    moe: MoEConfig | None = None
    shared_blocks: bool = False

    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    ffn_dropout: float = 0.0
    attention_out_dropout: float | None = None
    init_std: float = 0.02
    scaled_residual_init: bool = False
    fan_in_init: bool = False

    def __post_init__(self) -> None:
        assert self.norm_place in NORM_PLACES, self.norm_place
        assert self.norm_place == "input" or not self.parallel, "parallel blocks have norms at their inputs"
        assert self.parallel or not self.shared_norm, "only a parallel block has one norm for attention and MLP"
        assert not (self.parallel and self.cross_attention), "cross attention stands between attention and MLP"
        assert self.first_norm or self.norm_place == "input", "only a norm at the input can be left out of one block"
        assert not self.shared_blocks or self._blocks_are_alike, "blocks that differ cannot share their parameters"
        assert not (self.qk_norm_across_heads and self.qk_norm_each_head), "a norm over all heads has one weight"
        for name in ("windows", "rotary"):
            assert len(getattr(self, name)) in (0, self.num_layers), (name, getattr(self, name), self.num_layers)
        assert self.moe is None or set(self.moe.layers) <= set(range(self.num_layers)), self.moe
        assert self.moe is None or (self.gated and not self.ffn_dropout), "experts are gated and draw no dropout"

    @property
    def weight_std(self) -> float:
        """Standard deviation of projections of hidden states, other than queries."""
        return self.init_std * self.hidden_size**-0.5 if self.fan_in_init else self.init_std

    def out_std(self, inputs: int) -> float:
        """Standard deviation of projections of `inputs` features into the residual stream."""
        if self.fan_in_init:
            return self.init_std * inputs**-0.5
        return self.init_std / math.sqrt(2 * self.num_layers) if self.scaled_residual_init else self.init_std

    def attention(self, layer: int) -> AttentionShape:
        """Return the sizes and options of one layer's self-attention."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return AttentionShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=scale / (layer + 1) if self.scale_by_layer else scale,
            causal=self.causal,
            qkv_bias=self.qkv_bias,
            out_bias=self.attention_out_bias,
            qk_norm=self.qk_norm,
            qk_norm_across_heads=self.qk_norm_across_heads,
            qk_norm_each_head=self.qk_norm_each_head,
            qk_norm_after_rotary=self.qk_norm_after_rotary,
            query_temperature=self.query_temperature,
            window=self.windows[layer] if self.windows else None,
            softcap=self.attention_softcap,
            alibi=self.alibi,
            relative=self.relative,
            dropout=self.attention_dropout,
            q_std=self.weight_std * (self.head_dim**-0.5 if self.fan_in_init else 1.0),
            kv_std=self.weight_std,
            out_std=self.out_std(self.num_heads * self.head_dim),
            sinks=self.attention_sinks,
        )

    def cross(self, layer: int) -> AttentionShape | None:
        """Return the sizes and options of one layer's cross attention; None = the layer has none."""
        if not self.cross_attention:
            return None
        shape = replace(self.attention(layer), causal=False, window=None, alibi=None, relative=None, sinks=False)
        return replace(shape, query_temperature=None)

    def feed_forward(self, layer: int) -> MLPShape | MoEShape:
        """Return the sizes and options of one layer's feed-forward layer."""
        if self.moe is None or layer not in self.moe.layers:
            return self._dense(self.ffn_size)
        moe = self.moe
        return MoEShape(
            hidden_size=self.hidden_size,
            ffn_size=moe.ffn_size,
            router=moe.router,
            activation=self.activation,
            std=self.weight_std,
            out_std=self.out_std(moe.ffn_size),
            limit=moe.limit,
            bias=moe.bias,
            shared=self._dense(moe.shared_ffn_size) if moe.shared_ffn_size else None,
            shared_gate=moe.shared_gate,
            aux_loss=moe.aux_loss,
        )

    def _dense(self, ffn_size: int) -> MLPShape:
        return MLPShape(
            hidden_size=self.hidden_size,
            ffn_size=ffn_size,
            activation=self.activation,
            gated=self.gated,
            bias=self.mlp_bias,
            dropout=self.ffn_dropout,
            std=self.weight_std,
            out_std=self.out_std(ffn_size),
        )

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the blocks whose feed-forward layer is dense."""
        experts = self.moe.layers if self.moe is not None else ()
        return tuple(layer for layer in range(self.num_layers) if layer not in experts)

    def sublayers(self, layer: int) -> dict[str, AttentionShape | MLPShape | MoEShape]:
        """Return the shapes of one block's attention and feed-forward layers, by their names in `Block`."""
        cross = self.cross(layer)
        across = {"cross": cross} if cross is not None else {}
        return {"attention": self.attention(layer), **across, "mlp": self.feed_forward(layer)}

    def block_cost(self, layer: int) -> float:
        """Return the multiplications per position of one block's projections."""
        return float(sum(shape.cost for shape in self.sublayers(layer).values()))

    @property
    def _blocks_are_alike(self) -> bool:
        """True if nothing but the parameters can distinguish one block from another."""
        by_layer = len(set(self.windows)) > 1 or len(set(self.rotary)) > 1 or self.scale_by_layer
        return not (by_layer or self.moe is not None or not self.first_norm)

    @property
    def num_stored_blocks(self) -> int:
        """Number of blocks with parameters of their own."""
        return 1 if self.shared_blocks else self.num_layers

    @property
    def repeated_cost(self) -> float:
        """Multiplications per position of projections by weights that an earlier block has multiplied with already."""
        return sum(map(self.block_cost, range(1, self.num_layers))) if self.shared_blocks else 0.0

    @property
    def num_expert_params_idle(self) -> int:
        """Number of parameters of feed-forward layers that a position does not use: those of other experts."""
        shapes = map(self.feed_forward, range(self.num_layers))
        return sum(shape.num_params - shape.active_params for shape in shapes)

    @property
    def edges(self) -> set[int]:
        """Lengths beyond which the stack computes something else: of windows, stretched positions, growing queries."""
        windows = {window for window in self.windows if window is not None}
        stretched = {
            rotary.original_max_positions
            for rotary in self.rotary
            if rotary is not None and rotary.scaling in BY_LENGTH
        }
        growing = {self.query_temperature.length} if self.query_temperature is not None else set()
        return windows | stretched | growing

    @property
    def num_idle_params(self) -> int:
        """Number of parameters that cost a position no FLOPs."""
        return self.num_expert_params_idle

    def flops_per_token(self, num_params: int, num_frozen: int, seq_length: int) -> float:
        """Return the FLOPs of one token of a model that consists of this stack; see `model_flops_per_token`."""
        width, multiplied = self.attention(0).width, num_params + int(self.repeated_cost)
        return model_flops_per_token(multiplied, self.num_layers, width, seq_length, num_frozen)

    def without_dropout(self) -> Self:
        """Return the same stack, which computes the same on every run."""
        stack = replace(self, attention_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
        return replace(stack, attention_out_dropout=0.0)

    def axis_sizes(self) -> dict[str, int]:
        """Return the sizes of the axes of a stack's parameters; see `ModelConfig.axis_sizes`."""
        return {
            "h": self.hidden_size,
            "i": self.hidden_size,
            "f": self.ffn_size,
            "n": self.num_heads,
            "k": self.num_kv_heads,
            "g": self.num_heads // self.num_kv_heads,
            "d": self.head_dim,
            "b": self.relative.num_buckets if self.relative is not None else 0,
            "x": self.moe.router.num_experts if self.moe is not None else 0,
            "m": self.moe.ffn_size if self.moe is not None else 0,
            "u": self.moe.shared_ffn_size if self.moe is not None else 0,
            "j": 4,
            "l": self.num_heads // 4,
        }

    def model_shape(self, num_layers: int, vocab_size: int, positions: PositionTable | None) -> ModelShape:
        """Return the sizes that a run's checks need, of a model whose stacks all have these sizes."""
        return ModelShape(
            num_layers=num_layers,
            num_attention_heads=self.num_heads,
            ffn_size=math.gcd(*self._dense_widths()),
            hidden_size=self.hidden_size,
            vocab_size=vocab_size,
            max_positions=positions.max_positions if positions is not None else None,
            num_experts=self.moe.router.num_experts if self.moe is not None else 0,
            has_choice_bias=self.moe is not None and self.moe.router.choice_bias,
            causal=self.causal,
            score_options=self.score_options,
            length_ropes=tuple(sorted({one.scaling for one in self.rotary if one is not None} & BY_LENGTH)),
        )

    @property
    def score_options(self) -> tuple[str, ...]:
        """Names of what attention has beyond the softmax of plain scores, which kernels for a ring do not compute."""
        options = {
            "soft caps": self.attention_softcap is not None,
            "ALiBi": self.alibi is not None,
            "learned biases by distance": self.relative is not None,
            "attention dropout": self.attention_dropout > 0.0,
            "windows in every layer": bool(self.windows) and None not in self.windows,
        }
        return tuple(name for name, used in options.items() if used)

    def _dense_widths(self) -> list[int]:
        """Return the inner widths that the tensor axis divides: of dense layers and of shared experts."""
        shared = [self.moe.shared_ffn_size] if self.moe is not None else []
        return [*shared, *([self.ffn_size] if self.dense_layers else [])]
