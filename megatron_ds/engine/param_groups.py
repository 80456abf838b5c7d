"""Parameter groups of the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.experts import FoldedExperts
from megatron_ds.layers.param_spec import spec_of


def param_groups(module: nn.Module, section: OptimizerSection, folded: FoldedExperts | None) -> list[dict[str, Any]]:
    """Return groups of the parameters that are not frozen, with weight decay on matrices only, unless `decay_all`.

    The declaration of a parameter decides about its decay, not its shape, which ZeRO-3 has already flattened. Experts
    that DeepSpeed reduces apart are in groups of their own.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        decays = section.decay_all or spec_of(parameter).decay
        apart = folded is not None and spec_of(parameter).is_of_experts
        groups.setdefault((section.weight_decay if decays else 0.0, apart), []).append(parameter)
    options = folded.group_options if folded is not None else {}
    return [
        {"params": parameters, "weight_decay": decay, **(options if apart else {})}
        for (decay, apart), parameters in groups.items()
    ]
