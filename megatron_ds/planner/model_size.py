"""The parameters of a model, counted without memory for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ds.layers.param_spec import spec_of
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.planner.plan_input import PlanInput


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters of a complete model, shared ones once.

    Attributes:
        num_params: all of them.
        num_trained: those that are trained.
    """

    num_params: int
    num_trained: int


def model_size(given: PlanInput) -> ModelSize:
    """Count the parameters of a run's model on the meta device."""
    with torch.device("meta"):
        model = SequentialModel(given.layers(BuildContext()))
    sizes = {name: spec_of(parameter).numel for name, parameter in model.named_parameters()}
    return ModelSize(sum(sizes.values()), sum(size for name, size in sizes.items() if name not in given.frozen))
