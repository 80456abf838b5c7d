"""Bytes of optimizer state per element of a parameter, by the parameter groups of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.experts import FoldedExperts
from megatron_ds.engine.optimizers import OPTIMIZERS, STEPS
from megatron_ds.engine.param_groups import param_groups
from megatron_ds.planner.held_parameters import HeldStage, folds_experts
from megatron_ds.planner.plan_input import PlanInput

SAMPLE = 4096  # elements, a multiple of the blocks of quantised states


def state_bytes_of(given: PlanInput, held: HeldStage) -> list[float]:
    """Return for each group of `held.groups` the bytes that the optimizer keeps of one element.

    The optimizer is made for a small tensor, so that its own class says so.
    """
    section = given.config.optimizer
    if section is None or not given.config.trains:
        return [0.0] * len(held.groups)
    folded = FoldedExperts("experts", None, over_tensor=False) if folds_experts(given) else None  # type: ignore[arg-type]
    return [_bytes_per_element(section, group) for group in param_groups(held.module, section, folded, given.groups)]


def _bytes_per_element(section: OptimizerSection, group: Mapping[str, Any]) -> float:
    sample = nn.Parameter(torch.zeros(SAMPLE))
    kind = OPTIMIZERS.get(section.name, "optimizer.name")
    made = kind.from_section([{**group, "params": [sample]}], section, torch.device("cpu"), **section.options)
    made.create_state(sample, made.param_groups[0])
    tensors = [one for name, one in made.state[sample].items() if name != STEPS and isinstance(one, torch.Tensor)]
    return sum(one.nbytes for one in tensors) / SAMPLE
