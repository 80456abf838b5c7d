"""Parameters of a pipeline stage as its ranks hold them, without values: layers are built on torch's meta device.

ZeRO's buckets, shards and buffers follow from their sizes, their order, and the parameter groups of the optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_ds.engine.experts import FoldedExperts
from megatron_ds.engine.param_groups import param_groups
from megatron_ds.layers.param_spec import ParamSpec, spec_of
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec, register_layers
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.tensor import TensorParallel
from megatron_ds.planner.plan_input import PlanInput


@dataclass(frozen=True)
class HeldParameter:
    """A parameter on a rank.

    Attributes:
        name: in the full model.
        layer: index of the layer that it belongs to; of a tied parameter the first one of the stage.
        spec: its declaration.
        numel: elements of this rank's shard, padding included.
        trains: it has a gradient.
        apart: DeepSpeed reduces and shards it over the ranks with the same experts.
    """

    name: str
    layer: int
    spec: ParamSpec
    numel: int
    trains: bool
    apart: bool

    def is_added_in_products(self, compiled: Collection[int]) -> bool:
        """Return whether products can add its gradient to a sum in fp32, as those of matrices do.

        Args:
            compiled: see `compiled_layers`.
        """
        is_compiled = self.layer in compiled and not self.spec.is_of_experts
        return len(self.spec.shape) >= 2 and not is_compiled


@dataclass(frozen=True)
class HeldStage:
    """The parameters of a rank of a pipeline stage.

    Attributes:
        index: of the stage.
        layers: indices of its layers.
        parameters: all of them, each once, in the order of the module.
        groups: those that are trained, by the parameter groups of the optimizer.
        tied: names of trained parameters of which other stages hold copies, with the number of stages that do.
        used: name of a module -> the parameters that it reads itself; modules without any are left out.
        module: the stage on the meta device.
    """

    index: int
    layers: range
    parameters: tuple[HeldParameter, ...]
    groups: tuple[tuple[HeldParameter, ...], ...]
    tied: tuple[tuple[HeldParameter, int], ...]
    used: Mapping[str, tuple[HeldParameter, ...]]
    module: nn.Module

    @property
    def trained(self) -> tuple[HeldParameter, ...]:
        """Those that have gradients."""
        return tuple(one for one in self.parameters if one.trains)


def folds_experts(given: PlanInput) -> bool:
    """Return whether the experts are divided over other ranks than those of the tensor axis."""
    return given.core.shape().num_experts > 0 and given.expert_ranks != given.layout.tensor


def build_context(given: PlanInput) -> BuildContext:
    """Return what the layers of the first rank of a stage are built with: axes without process groups."""
    plan, tensor, expert = given.engine.context, given.layout.tensor, given.expert_ranks
    context = ContextParallel(_axis(plan.size), _axis(plan.ulysses), _axis(plan.ring), plan.method, plan.zigzag)
    tp = TensorParallel(_axis(tensor), given.config.parallel.sequence, context=context)
    return BuildContext(tp, experts=ExpertParallel(_axis(expert), tp))


def compiled_layers(given: PlanInput) -> frozenset[int]:
    """Return the indices of the layers whose products are in graphs of torch.compile, but for those of experts."""
    if not given.config.compile or given.layout.tensor > 1:
        return frozenset()
    return frozenset(index for index, spec in enumerate(given.layers(build_context(given))) if spec.is_block)


def hold_stage(given: PlanInput, stage: int) -> HeldStage:
    """Return the parameters of the first rank of a pipeline stage; all of the stage have as many elements.

    Args:
        given: the run.
        stage: index of the stage.
    """
    specs, bounds = given.layers(build_context(given)), given.stage_bounds
    layers = range(bounds[stage], bounds[stage + 1])
    module, renamed = _build(specs[layers.start : layers.stop])
    indices = {specs[number].name: number for number in layers}
    folded = FoldedExperts("experts", None, over_tensor=False) if folds_experts(given) else None  # type: ignore[arg-type]
    held: dict[int, HeldParameter] = {}
    for name, parameter in module.named_parameters():
        full = renamed.get(name, name)
        parameter.requires_grad_(full not in given.frozen)
        spec = spec_of(parameter)
        layer = next(index for own, index in indices.items() if name.startswith(f"{own}."))
        apart = folded is not None and spec.is_of_experts
        held[id(parameter)] = HeldParameter(full, layer, spec, parameter.numel(), parameter.requires_grad, apart)
    section = given.config.optimizer
    groups = param_groups(module, section, folded, given.groups) if section is not None else []
    by_group = tuple(tuple(held[id(one)] for one in group["params"]) for group in groups)
    if section is None:
        by_group = (tuple(one for one in held.values() if one.trains),)
    holders = _holders(specs, bounds)
    tied = tuple((one, len(holders[one.name])) for one in held.values() if one.trains and one.name in holders)
    return HeldStage(stage, layers, tuple(held.values()), by_group, tied, _used(module, held), module)


def _axis(size: int) -> Axis:
    return Axis(size, 0, tuple(range(size)))


def _build(specs: Sequence[LayerSpec]) -> tuple[nn.Module, dict[str, str]]:
    """Return the layers in one module, and the names of its copies of tied parameters; see `register_layers`."""
    module = nn.Module()
    with torch.device("meta"):
        return module, register_layers(module, specs, [spec.build() for spec in specs])


def _used(module: nn.Module, held: Mapping[int, HeldParameter]) -> dict[str, tuple[HeldParameter, ...]]:
    """Return the parameters that each module reads itself, its own and those that it borrows of others."""
    found = {}
    for name, part in module.named_modules():
        own = [*part.parameters(recurse=False), *getattr(part, "borrowed", ())]
        if own:
            found[name] = tuple(dict.fromkeys(held[id(one)] for one in own))
    return found


def _holders(specs: Sequence[LayerSpec], bounds: Sequence[int]) -> dict[str, set[int]]:
    """Return name -> pipeline stages of every parameter that more than one of them holds."""

    def stage_of(layer: int) -> int:
        return sum(bound <= layer for bound in bounds[1:-1])

    owners = {spec.name: stage_of(index) for index, spec in enumerate(specs)}
    holders: dict[str, set[int]] = {}
    for index, spec in enumerate(specs):
        for original in spec.tied.values():
            owner = next(stage for name, stage in owners.items() if original.startswith(f"{name}."))
            holders.setdefault(original, {owner}).add(stage_of(index))
    return {name: stages for name, stages in holders.items() if len(stages) > 1}


def num_elements(parameters: Sequence[HeldParameter]) -> int:
    """Return the number of elements of parameters on a rank."""
    return sum(one.numel for one in parameters)
