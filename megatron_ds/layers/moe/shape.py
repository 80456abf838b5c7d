"""Sizes and options of a mixture of experts: a router, its experts, and shared experts that every token uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from megatron_ds.layers.adapter_layers import AdaptableWeight
from megatron_ds.layers.mlp import ACTIVATIONS, MLPShape

SCORES = ("softmax", "softmax_of_chosen", "sigmoid")
GROUP_SCORES = ("max", "top2")


@dataclass(frozen=True, kw_only=True)
class RouterShape:
    """Sizes and options of a router: the choice of k of E experts for each token, and their weights.

    Attributes:
        num_experts, top_k: E, k.
        score: the scores of the experts, from the router's logits: "softmax" over all, "softmax_of_chosen" over the k
            chosen by their logits, or "sigmoid".
        renormalise: the weights of the chosen are divided by their sum, of at least `least_sum`.
        scale: factor of the weights, after that.
        num_groups: groups of consecutive experts; `top_groups` of them are chosen first, by the largest score in each,
            or by the sum of its two largest (`group_score` "max" or "top2"), and then experts in these.
        choice_bias: a bias of each expert that is added to its score for the choice alone. It has no gradient.
        bias: the logits have a bias.
        fp32: the logits are computed in fp32 whatever the model's dtype is; otherwise they are cast to it.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    renormalise: bool = True
    least_sum: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    choice_bias: bool = False
    bias: bool = False
    fp32: bool = False

    def __post_init__(self) -> None:
        assert self.score in SCORES, self.score
        assert self.group_score in GROUP_SCORES, self.group_score
        assert 1 <= self.top_k <= self.num_experts, (self.top_k, self.num_experts)
        assert self.num_experts % self.num_groups == 0, (self.num_experts, self.num_groups)
        assert 1 <= self.top_groups <= self.num_groups, (self.top_groups, self.num_groups)
        assert not (self.choice_bias and self.score == "softmax_of_chosen"), "a choice by logits has no bias"


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """Sizes and options of one feed-forward layer that is a mixture of experts (Shazeer et al. 2017).

    Attributes:
        hidden_size, ffn_size: H, and the inner width F of one expert.
        router: the choice of experts.
        activation: a name in `ACTIVATIONS`; every expert computes down(act(gate(x)) * up(x)).
        limit: gate(x) is bounded above by it, up(x) on both sides, and 1 is added to up(x); None = neither.
        bias: the experts' projections have biases.
        std, out_std: standard deviations at initialisation, of router, gate and up, and of down.
        shared: a feed-forward layer whose output is added for every token; None = no such layer.
        shared_gate: this output is multiplied by the sigmoid of a projection of x to one number.
        aux_loss: coefficient of the load-balancing loss, unless the run sets it.
    """

    hidden_size: int
    ffn_size: int
    router: RouterShape
    activation: str
    std: float
    out_std: float
    limit: float | None = None
    bias: bool = False
    shared: MLPShape | None = None
    shared_gate: bool = False
    aux_loss: float = 0.0

    def __post_init__(self) -> None:
        assert self.activation in ACTIVATIONS, self.activation
        assert self.shared is not None or not self.shared_gate, "only shared experts have a gate"

    @property
    def cost(self) -> int:
        """Multiplications per position of all projections that it uses."""
        shared = self.shared.cost if self.shared is not None else 0
        return self._router_weights + self.router.top_k * self._expert_weights + shared

    @property
    def num_params(self) -> int:
        """Number of parameters, biases included, but not that of the choice."""
        return self._count(self.router.num_experts)

    @property
    def active_params(self) -> int:
        """Number of parameters that one position uses: those of k experts, and all others."""
        return self._count(self.router.top_k)

    @property
    def adaptable_weights(self) -> tuple[AdaptableWeight, ...]:
        """The weights that adapters can change. Gate and up of an expert share its A, as one matrix in transformers."""
        bare = partial(AdaptableWeight, is_bare=True, low_rank_only=True)
        found = [
            bare("router.weight", ("router",), is_column=False),
            bare("experts.up_weight", ("gate", "up"), is_column=True, module="experts"),
            bare("experts.down_weight", ("down",), is_column=False, module="experts"),
        ]
        if self.shared is not None:
            weights = self.shared.adaptable_weights
            found += [replace(one, name=f"shared.{one.name}", module="shared") for one in weights]
        if self.shared_gate:
            found.append(AdaptableWeight("shared_gate.weight", ("shared_gate",), is_column=False, low_rank_only=True))
        return tuple(found)

    @property
    def _expert_weights(self) -> int:
        return 3 * self.hidden_size * self.ffn_size

    @property
    def _router_weights(self) -> int:
        return self.hidden_size * (self.router.num_experts + self.shared_gate)

    def _count(self, experts: int) -> int:
        per_expert = self._expert_weights + (2 * self.ffn_size + self.hidden_size if self.bias else 0)
        of_router = self._router_weights + self.router.num_experts * self.router.bias
        return of_router + experts * per_expert + (self.shared.num_params if self.shared is not None else 0)
