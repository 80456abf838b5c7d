"""Layouts whose traffic is planned, and counted in a real step on forked ranks."""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from megatron_ds.engine import build_engine
from megatron_ds.layers.moe.dispatch import Dispatch
from megatron_ds.parallel.grid import Axis, Grid
from megatron_ds.planner.operations import Collective, Message, Work
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.runtime import LoadedModel, load_model
from megatron_ds.runtime.optimizer_groups import grouped_parameters
from megatron_ds.runtime.setup import engine_options, plan_engine
from tests.parallel.wire_calls import WORLD_SEND, WireCalls, recording
from tests.parity.batches import TARGETS, batch_for, ours
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.ours import Place, engine_config
from tests.ranks import rank_device

CASES = {**CONFIGS, **ENCODER_CASES, **FAMILY_CASES}
STEPS = 2
"""ZeRO-3 knows the order of layers from the third micro-batch on, and stages send shapes in the first step."""

Key = tuple[tuple[int, ...], str]


@dataclass
class Traffic:
    """Calls and bytes by the ranks of a group and the kind of communication."""

    calls: dict[Key, int] = field(default_factory=dict)
    bytes: dict[Key, Fraction] = field(default_factory=dict)

    def add(self, key: Key, number: int, size: Fraction) -> None:
        """Add calls of some size each; those of nothing are left out."""
        if size:
            self.calls[key] = self.calls.get(key, 0) + number
            self.bytes[key] = self.bytes.get(key, Fraction(0)) + size * number


def loaded(case: str, recipe: Recipe, **fields: Any) -> LoadedModel:
    """A model with random weights."""
    return load_model(CASES[case], freeze=recipe.frozen, **fields)


def planned(model: LoadedModel, place: Place, recipe: Recipe) -> PlanInput:
    """The input of the planner for a place, with each rank on a machine of its own."""
    config = engine_config(place, recipe)
    engine = plan_engine(config, model.hf, place.layout.world_size, "cpu", trains_part=bool(model.frozen))
    batch = ours(model.hf.family.model_type, batch_for(model.hf.family.model_type, recipe, 0))
    target = TARGETS - 32 + recipe.length if "decoder_input_ids" in batch else None
    rows = Rows(recipe.length, target, tuple(batch))
    machines = Machines(place.layout.world_size, 1, "cpu")
    groups = grouped_parameters(model, config.optimizer)
    return PlanInput(model.layers, model.hf.core, engine, rows, machines, model.frozen, groups)


def counted(grid: Grid, model: LoadedModel, place: Place, recipe: Recipe) -> WireCalls:
    """What a rank sends in a step, over process groups alone: ranks of one machine do not share memory here."""
    plan = plan_engine(engine_config(place, recipe), model.hf, grid.world.size, "cpu", trains_part=bool(model.frozen))
    options = engine_options(model, plan)
    engine = build_engine(model.layers, grid, rank_device(), options, model.read_shard, model.prepare)
    kind = model.hf.family.model_type
    route_evenly()
    for step in range(STEPS):
        batches = labelled_everywhere(grid, place, recipe, step, kind)
        with recording() as wire:
            engine.train_step(batches, recipe.lr)
    return wire


def route_evenly() -> None:
    """Have the tokens of this process choose all experts alike, whatever their routers say."""
    decide = Dispatch.__init__

    def even(self: Dispatch, chosen: torch.Tensor, num_experts: int, axis: Axis) -> None:
        decide(self, (torch.arange(chosen.numel()) % num_experts).view(chosen.shape), num_experts, axis)

    Dispatch.__init__ = even  # type: ignore[method-assign]


Batch = dict[str, torch.Tensor]


def labelled_everywhere(grid: Grid, place: Place, recipe: Recipe, step: int, kind: str) -> list[Batch]:
    """Micro-batches whose positions all carry loss, because the softmax communicates for those alone."""
    whole, size = ours(kind, batch_for(kind, recipe, step)), place.micro_batch(recipe)
    whole["targets"] = whole["targets"].clamp(min=3)
    per_rank = recipe.global_batch // grid.batch.size
    mine = slice(grid.batch.rank * per_rank, (grid.batch.rank + 1) * per_rank)
    parts = {name: column[mine] for name, column in whole.items()}
    return [{name: column[at : at + size] for name, column in parts.items()} for at in range(0, per_rank, size)]


def by_ranks(work: Work, grid: Grid) -> Traffic:
    """Planned calls and bytes by the ranks of an axis and the kind of communication, on CPU.

    There all-gathers and reduce-scatters are messages, one to each of the other ranks.
    """
    found = Traffic()
    for one, number in work.items():
        if isinstance(one, Message):
            found.add((ranks_of(one.axis, grid), "message"), number, one.sent_bytes)
        elif isinstance(one, Collective) and one.kind in ("all_gather", "reduce_scatter"):
            size = one.sent_bytes / (one.ranks - 1)
            found.add((ranks_of(one.axis, grid), "message"), number * (one.ranks - 1), size)
        elif isinstance(one, Collective):
            found.add((ranks_of(one.axis, grid), one.kind), number, one.sent_bytes)
    return found


def ranks_of(axis: str, grid: Grid) -> tuple[int, ...]:
    """The ranks along an axis of the planner."""
    if axis == "model":
        return grid.layout.peers_of(grid.rank, "pipeline", "tensor")
    if axis == "stage":
        return grid.layout.peers_of(grid.rank, "data", "context", "tensor")
    if axis == "hpz":
        begin = grid.rank - grid.rank % 2
        return (begin, begin + 1)
    if axis == "tied":
        here = grid.axes["pipeline"].ranks
        return tuple(sorted({here[0], here[-1]}))
    known = grid.axes.get(axis) or getattr(grid, axis)
    return tuple(sorted(known.ranks))


def seen(wire: WireCalls, grid: Grid) -> Traffic:
    """Counted calls and bytes in the same form. Stages send to each other in the group of all ranks."""
    found = Traffic()
    stages, everyone = set(grid.pipeline.ranks), tuple(range(grid.layout.world_size))
    for (kind, ranks, size), number in wire.calls.items():
        if kind == WORLD_SEND:
            ranks = tuple(sorted(stages)) if set(ranks) <= stages else everyone
        found.add((ranks, "message" if kind in ("send", WORLD_SEND) else kind), number, size)
    return found


def with_settings(place: Place, **zero: Any) -> Place:
    """A place with keys of `zero_optimization` in the DeepSpeed JSON."""
    section = {"stage": place.zero, "stage3_param_persistence_threshold": 64, **zero}
    return replace(place, extra=(("zero_optimization", section),))
