"""The models of published runs: this package's layers from the sizes of a row, traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_ds.config import ContextPlan
from megatron_ds.layers.kernels.select import AUTO
from megatron_ds.layers.moe.shape import RouterShape
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.stack import MoEConfig
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.trace import TraceSetting, trace_layers


@dataclass(frozen=True)
class Sizes:
    """A model's sizes.

    Attributes:
        layers: number of blocks, the first `dense` of which have no experts where others have.
        moe: (experts, experts of a token, inner width of each, inner width of shared ones); None = no experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    glu: bool
    vocab: int
    seq: int
    moe: tuple[int, int, int, int] | None = None
    dense: int = 0

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Sizes:
        """Return the sizes of a row's model."""
        moe = None
        if "experts" in model:
            moe = model["experts"], model["topk"], model["moe_ffn"], model.get("shared_ffn") or 0
        return cls(
            model["layers"],
            model["hidden"],
            model["heads"],
            model["kv_heads"],
            model.get("head_dim") or model["hidden"] // model["heads"],
            model["ffn"] or model["moe_ffn"],
            model["glu"],
            model["vocab"],
            model["seq"],
            moe,
            model.get("dense_layers") or 0,
        )

    @property
    def tied(self) -> bool:
        """Models with plain feed-forward layers, of GPT's kind, share embedding and head."""
        return not self.glu

    @property
    def attention_params(self) -> int:
        """Of a block."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_params(self) -> int:
        """Of a block without experts."""
        return self.hidden * (3 if self.glu else 2) * self.ffn

    @property
    def expert_params(self) -> int:
        """Of all experts of a block that has some, without the shared ones."""
        return 0 if self.moe is None else self.hidden * (3 if self.glu else 2) * self.moe[0] * self.moe[2]

    @property
    def shared_params(self) -> int:
        """Of the router and the shared experts of a block."""
        if self.moe is None:
            return 0
        return self.hidden * (self.moe[0] + (3 if self.glu else 2) * self.moe[3])

    @property
    def embedding_params(self) -> int:
        """Of the embedding, or of the head."""
        return self.hidden * self.vocab

    def core(self) -> DecoderConfig:
        """Return a model with these sizes, and one block of each kind that it has."""
        kinds = min(1, self.dense) + 1
        norm = NormStyle("rms" if self.glu else "layer", 1e-5)
        moe = None
        if self.moe is not None:
            num, chosen, width, shared = self.moe
            router = RouterShape(num_experts=num, top_k=chosen, fp32=True)
            moe = MoEConfig(router=router, ffn_size=width, layers=(kinds - 1,), shared_ffn_size=shared)
        rotary = (RotaryConfig(self.head_dim),) * kinds if self.glu else ()
        return DecoderConfig(
            family="published",
            vocab_size=self.vocab,
            tied=self.tied,
            embedding_size=self.hidden,
            hidden_size=self.hidden,
            num_layers=kinds,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn_size=self.ffn,
            norm=norm,
            rotary=rotary,
            activation="silu" if self.glu else "gelu_tanh",
            gated=self.glu,
            moe=moe,
        )


@dataclass(frozen=True)
class Traced:
    """The traces of a model: layers before the blocks, one block of each kind, and layers after them."""

    before: Sequence[LayerTrace]
    blocks: Sequence[LayerTrace]
    after: Sequence[LayerTrace]


@cache
def trace(
    sizes: Sizes, *, micro_batch: int, tensor: int, sequence: bool, context: int, expert: int, fused: bool
) -> Traced:
    """Return the traces of a model on one rank of a layout; `fused`: with fused kernels for norms and activations."""
    plan = ContextPlan(ring=context, method="ring", zigzag=True) if context > 1 else ContextPlan()
    setting = TraceSetting(
        seq_length=sizes.seq,
        micro_batch_size=micro_batch,
        tensor=tensor,
        sequence=sequence,
        context=plan,
        kernels=AUTO if fused else "torch",
        expert=expert if sizes.moe is not None else None,
    )
    layers = trace_layers(sizes.core().build_layers, setting)
    blocks = [index for index, layer in enumerate(layers) if layer.is_block]
    first, last = blocks[0], blocks[-1]
    return Traced(layers[:first], layers[first : last + 1], layers[last + 1 :])
