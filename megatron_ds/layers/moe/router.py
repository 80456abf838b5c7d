"""The router: the choice of experts for each token, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ds.layers.moe.shape import RouterShape
from megatron_ds.layers.param_spec import Matrices, ParamSpec, make_parameter
from megatron_ds.layers.products import linear
from megatron_ds.parallel.expert import ExpertParallel

CHOICE_BIAS = "choice_bias"
"""Name of a router's bias of the choice: a weight of the model, but no parameter."""


@dataclass(frozen=True)
class Routing:
    """The experts of T tokens.

    Attributes:
        chosen: (T, k) int64, experts.
        weights: (T, k) fp32, of their results.
        logits: (T, E) fp32.
        shares: (T, E) fp32, a distribution over experts for each token, for the load-balancing loss.
    """

    chosen: Tensor
    weights: Tensor
    logits: Tensor
    shares: Tensor


class Router(nn.Module):
    """A projection of hidden states to one logit per expert, and a choice by these.

    (T, H) -> logits (T, E) fp32, from which `route` chooses. Every rank has the full router, whose gradient is summed
    over the tensor ranks. The module returns a tensor, because DeepSpeed hooks those that a module returns, to gather
    ZeRO-3's parameters for the backward pass, and finds none inside other objects.

    The bias of the choice (Wang et al. 2024) is fp32 whatever the model's dtype is, has no gradient, and so is no
    parameter; see `untrained`.

    Args:
        shape: sizes and options.
        hidden_size: H.
        parallel: the tensor ranks, which route different tokens.
        std: standard deviation of the weight's initialisation.
    """

    def __init__(self, shape: RouterShape, hidden_size: int, parallel: ExpertParallel, std: float) -> None:
        super().__init__()
        self.shape, self.parallel = shape, parallel
        axes, experts = parallel.tp.axes, shape.num_experts
        self.weight = make_parameter(ParamSpec((experts, hidden_size), std=std, matrices=Matrices()), axes)
        self.bias = make_parameter(ParamSpec((experts,), decay=False), axes) if shape.bias else None
        self.choice_bias: Tensor | None = None
        if shape.choice_bias:
            self.choice_bias = self.weight.new_zeros((experts,), dtype=torch.float32)
            self.choice_bias.spec = ParamSpec((experts,), decay=False)  # type: ignore[attr-defined]

    def untrained(self) -> dict[str, Tensor]:
        """Return the weights of the model that are no parameters, each with its declaration, by name."""
        return {CHOICE_BIAS: self.choice_bias} if self.choice_bias is not None else {}

    def forward(self, tokens: Tensor) -> Tensor:
        weight, bias = (self.parallel.enter(one) if one is not None else None for one in (self.weight, self.bias))
        assert weight is not None
        if self.shape.fp32:
            tokens, weight = tokens.float(), weight.float()
            bias = bias.float() if bias is not None else None
        return linear(tokens, weight, bias).float()

    def route(self, logits: Tensor) -> Routing:
        """Choose the experts of each token and compute their weights; logits (T, E)."""
        shape = self.shape
        if shape.score == "softmax_of_chosen":
            top, chosen = logits.topk(shape.top_k, -1)
            return Routing(chosen, top.softmax(-1) * shape.scale, logits, logits.softmax(-1))
        scores = logits.softmax(-1) if shape.score == "softmax" else logits.sigmoid()
        chosen = self._choose(scores.detach())
        weights = scores.gather(1, chosen)
        if shape.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=shape.least_sum)
        shares = scores if shape.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        return Routing(chosen, weights * shape.scale, logits, shares)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the experts with the k largest scores, in the best groups if there are any: (T, E) -> (T, k)."""
        shape = self.shape
        if self.choice_bias is not None:
            scores = scores + self.choice_bias
        if shape.top_groups < shape.num_groups:
            groups = scores.unflatten(-1, (shape.num_groups, -1))
            best = groups.amax(-1) if shape.group_score == "max" else groups.topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(shape.top_groups, -1).indices, True)
            scores = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(shape.top_k, -1).indices
