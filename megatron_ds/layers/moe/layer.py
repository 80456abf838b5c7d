"""The mixture of experts as a feed-forward layer (Shazeer et al. 2017), without dropped tokens (Gale et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec, ReplicatedAdapter
from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.linear import ReplicatedLinear
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.moe.balance import RouterLoad, RouterSettings, router_losses, with_loss
from megatron_ds.layers.moe.dispatch import Dispatch, count_per_expert
from megatron_ds.layers.moe.experts import Experts
from megatron_ds.layers.moe.router import Router, Routing
from megatron_ds.layers.moe.shape import MoEShape
from megatron_ds.layers.recompute import is_replaying
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.regions import DISPATCH, EXPERTS, ROUTER, profiled


class MoE(nn.Module):
    """The weighted sum of the k experts that a router chooses for each token, and of the shared experts if any.

    (S, B, H) -> (S, B, H), or (S/t, B, H) -> (S/t, B, H) under sequence parallelism. Each tensor rank routes different
    tokens: those that it has, or its part of those that all have. Forward and backward, per micro-batch: 4 all-to-alls
    over the e expert ranks, of k T H (e-1)/e elements each for T tokens of a rank that are routed uniformly; an
    all-to-all of E counts; over tensor, all-reduces of the router's gradient, EH elements, and of E + 1 sums, which
    context ranks sum too; without sequence parallelism also all-gathers of 2 SBH(t-1)/t elements; the traffic of an MLP
    for shared experts.

    Args:
        shape: sizes and options.
        parallel: the ranks that divide experts and tokens.
        settings: coefficients of the router's losses.
        rng: random streams of the shared experts.
        kernels: the kernels of SwiGLU and GeGLU.
    """

    def __init__(
        self,
        shape: MoEShape,
        parallel: ExpertParallel,
        settings: RouterSettings,
        rng: RngStreams | None = None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.shape, self.parallel, self.settings, self.rng = shape, parallel, settings, rng
        self.router = Router(shape.router, shape.hidden_size, parallel, shape.std)
        self.load = RouterLoad(shape.router.num_experts, self.router.weight)
        self.experts = Experts(shape, parallel, kernels)
        self.shared = MLP(shape.shared, parallel.tp, rng, kernels) if shape.shared is not None else None
        self.shared_gate = None
        if shape.shared_gate:
            self.shared_gate = ReplicatedLinear(shape.hidden_size, 1, parallel.tp, std=shape.std)
        self.adapters = nn.ModuleDict()

    @torch.compiler.disable  # row counts change from step to step
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: hidden states.
            mask: (B, S), 0 where a position is padding, which balance does not count; None = nowhere.
        """
        own = self.parallel.own_tokens(x.flatten(0, 1))
        with profiled(ROUTER):
            routing = self.router.route(self._logits(own))
        with profiled(DISPATCH):
            dispatch = Dispatch(routing.chosen, self.shape.router.num_experts, self.parallel.axis)
            rows = dispatch.send(own)
        with profiled(ROUTER):
            weights = self._balanced(routing, dispatch, self._real(x, mask)) if self.training else routing.weights
        with profiled(EXPERTS):
            rows = self.experts(rows, dispatch.groups)
        with profiled(DISPATCH):
            mixed = self.parallel.all_tokens(dispatch.combine(rows, weights), x.shape[0] * x.shape[1]).view(x.shape)
        return mixed if self.shared is None else mixed + self._shared(x)

    def adapt(self, outputs: Sequence[str], adapter: LoRASpec | IA3Spec) -> None:
        """Add an adapter to `("router",)` or `("shared_gate",)`; see `Experts.adapt` and `MLP.adapt` for others."""
        assert isinstance(adapter, LoRASpec) and not adapter.dora, adapter
        (name,) = outputs
        size, enter = {"router": (self.shape.router.num_experts, self.parallel.enter), "shared_gate": (1, None)}[name]
        tp, hidden = self.parallel.tp, self.shape.hidden_size
        self.adapters[name] = ReplicatedAdapter(hidden, size, adapter, tp, self.rng, enter)

    def _logits(self, own: Tensor) -> Tensor:
        logits = self.router(own)
        return logits + self.adapters["router"](own.float()) if "router" in self.adapters else logits

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        found = self.shared(x)
        if self.shared_gate is None:
            return found
        gate = self.shared_gate(x)
        if "shared_gate" in self.adapters:
            gate = gate + self.adapters["shared_gate"](x)
        return F.sigmoid(gate) * found

    def _real(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return which of this rank's tokens are no padding, (T,) bool."""
        if mask is None:
            return None
        tp, by_position = self.parallel.tp, mask.t().bool()
        real = by_position[tp.positions(len(by_position), mask.device)].flatten()
        return self.parallel.own_tokens(real)

    def _balanced(self, routing: Routing, dispatch: Dispatch, real: Tensor | None) -> Tensor:
        """Return the weights; where they are differentiated, so are the router's losses. Count the tokens once."""
        settings, counts = self.settings, dispatch.chosen_counts
        aux = self.shape.aux_loss if settings.aux_loss is None else settings.aux_loss
        is_differentiated = routing.weights.requires_grad and bool(aux or settings.z_loss)
        if is_replaying() and not is_differentiated:
            return routing.weights
        if real is not None:  # E stands for no expert: to leave tokens out, the host would wait for their number
            experts = self.shape.router.num_experts
            kept = routing.chosen.masked_fill(~real.unsqueeze(-1), experts).flatten().sort().values
            counts = count_per_expert(kept, experts)
        with torch.set_grad_enabled(is_differentiated):
            balance, z = router_losses(routing, counts, real, self.parallel.token_axes)
        if not is_replaying():
            self.load.add(counts, balance, z)
        if not is_differentiated:
            return routing.weights
        return with_loss(routing.weights, aux * balance + settings.z_loss * z, settings)
