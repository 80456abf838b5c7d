"""Parameter groups of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.experts import FoldedExperts
from megatron_ds.engine.optimizers import LR_FACTOR, OPTIMIZERS
from megatron_ds.layers.param_spec import spec_of


class GroupKey(NamedTuple):
    """The properties that the parameters of one group share.

    Attributes:
        lr_factor: the learning rate divided by that of the run.
        weight_decay: the weight decay.
        apart: DeepSpeed reduces and shards them over other ranks than all others: they are of experts.
        options: further keys of the group, by the optimizer; see `GuardedOptimizer.group_options`.
    """

    lr_factor: float
    weight_decay: float
    apart: bool
    options: tuple[tuple[str, Any], ...] = ()


def param_groups(
    module: nn.Module, section: OptimizerSection, folded: FoldedExperts | None, entries: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return groups of the parameters that are not frozen, one for each `GroupKey`.

    Weight decay is on matrices only, unless `decay_all` or an entry of `optimizer.groups` says otherwise. The
    declaration of a parameter decides, not its shape, which ZeRO-3 has already flattened. Pipeline stages may have
    different groups.

    Args:
        module: this rank's part of the model.
        section: the run file's section.
        folded: groups of the ranks with the same experts, if DeepSpeed reduces experts apart.
        entries: name of a parameter in the full model -> index of its entry in `section.groups`.
    """
    renamed: dict[str, str] = getattr(module, "renamed", {})
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = _group_key(parameter, section, folded, entries.get(renamed.get(name, name)))
            groups.setdefault(key, []).append(parameter)
    options = folded.group_options if folded is not None else {}
    return [
        {
            "params": parameters,
            "weight_decay": key.weight_decay,
            LR_FACTOR: key.lr_factor,
            **dict(key.options),
            **(options if key.apart else {}),
        }
        for key, parameters in groups.items()
    ]


def _group_key(
    parameter: nn.Parameter, section: OptimizerSection, folded: FoldedExperts | None, entry: int | None
) -> GroupKey:
    spec = spec_of(parameter)
    decay = section.weight_decay if section.decay_all or spec.decay else 0.0
    own = dict(OPTIMIZERS.get(section.name, "optimizer.name").group_options(spec, section))
    factor = own.pop(LR_FACTOR, 1.0)
    if entry is not None:
        group = section.groups[entry]
        factor = group.factor(section.lr) if group.sets_lr else factor
        decay = decay if group.weight_decay is None else group.weight_decay
    return GroupKey(factor, decay, folded is not None and spec.is_of_experts, tuple(own.items()))
