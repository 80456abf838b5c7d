"""Estimators of candidates by formulas on one line each, for tests of the search itself."""

from dataclasses import dataclass, field
from math import ceil

from megatron_ds.config import ModelShape, RunConfig
from megatron_ds.planner.search.branch_and_bound import Estimate
from megatron_ds.planner.search.space import Candidate

FLOPS_S, LINK_BYTES_S = 4.0e14, 2.0e11
ACTIVATIONS = {"none": 34, "selective": 28, "full": 4}


@dataclass
class SimpleEstimators:
    """Time and memory of a decoder by its number of parameters.

    Attributes:
        run: the run.
        shape: sizes of its model.
        world_size: number of ranks.
        exact_calls: candidates that `exact` was asked for.
    """

    run: RunConfig
    shape: ModelShape
    world_size: int
    exact_calls: list[Candidate] = field(default_factory=list)

    @property
    def num_params(self) -> float:
        experts, shape = max(1, self.shape.num_experts), self.shape
        return shape.num_layers * (4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.ffn_size * experts)

    def micro_batches(self, one: Candidate) -> int:
        return self.run.train.global_batch_size * one.model_ranks // (self.world_size * one.micro_batch_size)

    def seconds(self, one: Candidate) -> tuple[float, float]:
        """Seconds of products with the pipeline's bubble, and of what ranks exchange."""
        shape, layers = self.shape, ceil(self.shape.num_layers / one.pipeline)
        tokens, width = one.micro_batch_size * self.run.data.seq_length / one.context, shape.hidden_size
        of_stage, count = self.num_params / shape.num_layers * layers, self.micro_batches(one)
        again = {"none": 0.0, "selective": 0.2, "full": 1.5 if one.keep_attention else 2.0}[one.recompute]
        products = (6 + again) * of_stage * tokens / one.tensor / FLOPS_S * (count + one.pipeline - 1)
        per_layer = 16 * (1 - 1 / one.tensor) + 8 * (1 - 1 / one.context) + 8 * (1 - 1 / (one.expert or 1))
        gathered = 2 * of_stage / one.tensor * {1: 2, 2: count, 3: 3 * count}[one.zero_stage]
        moved = (of_stage if one.offload_optimizer else 0) + (tokens * width * layers if one.offload_activations else 0)
        return products, (per_layer * layers * tokens * width * count + gathered + moved) / LINK_BYTES_S

    def held_bytes(self, one: Candidate) -> tuple[float, float]:
        """Bytes of weights, gradients and states on the device and on the host."""
        shape = self.shape
        own = self.num_params / shape.num_layers * ceil(shape.num_layers / one.pipeline)
        own /= max(one.tensor, one.expert or 1)
        shares = self.world_size // one.tensor // one.pipeline
        held = (2 + 4 / shares if one.zero_stage < 3 else 6 / shares) + (0 if one.offload_optimizer else 12 / shares)
        return own * held, own * 12 / shares if one.offload_optimizer else 0.0

    def lower_bound(self, one: Candidate) -> Estimate:
        """Most of the time, and memory without activations."""
        products, exchanged = self.seconds(one)
        device, host = self.held_bytes(one)
        return Estimate(products + 0.9 * exchanged, int(device), int(host))

    def exact(self, one: Candidate) -> Estimate:
        """All of the time, and memory with activations."""
        self.exact_calls.append(one)
        shape, (device, host) = self.shape, self.held_bytes(one)
        kept = ACTIVATIONS[one.recompute] + (4 if one.keep_attention else 0) - (2 if one.offload_activations else 0)
        layers = ceil(shape.num_layers / one.pipeline) * min(one.pipeline, self.micro_batches(one))
        tokens = one.micro_batch_size * self.run.data.seq_length / one.context / one.tensor
        return Estimate(sum(self.seconds(one)), int(device + kept * layers * tokens * shape.hidden_size), int(host))
