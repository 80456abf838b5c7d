"""The limit of a run, and the changes of single settings that help most, found by planning each change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

from megatron_ds.planner.held_parameters import hold_stage
from megatron_ds.planner.plan import GB, Plan, largest_parts
from megatron_ds.planner.plan_values import percent
from megatron_ds.planner.search.space import Candidate
from megatron_ds.planner.zero_settings import zero_settings

LEAST_GAIN = 0.02
"""Share of a step by which a change must be faster to be advised: smaller ones are within the plan's error."""

USED_MEMORY = 0.9
"""Share of a device's free memory that weights may take which ZeRO-3 keeps for their next use."""

MOST_SHOWN = 3
"""Number of advised changes."""

ZeroKeys = Mapping[str, int | bool]
"""Keys of the section `zero_optimization` with their values."""

Replan = Callable[[Candidate, ZeroKeys], Plan | None]
"""Candidate and further settings of ZeRO -> their plan; None = `train` would refuse them."""

_COMPUTES = "compute"


@dataclass(frozen=True)
class Advice:
    """A change of the run's settings.

    Attributes:
        changes: keys of the run file with their values, as overrides.
        plan: of the changed run.
    """

    changes: tuple[str, ...]
    plan: Plan


def describe_limit(plan: Plan) -> str:
    """Return a line on what limits a run: its memory, or the largest part of its step."""
    memory = plan.fullest
    if not plan.fits:
        name, largest = largest_parts(memory.parts)[0]
        where = f" of stage {memory.stage}" if len(plan.memory) > 1 else ""
        needs = f"a rank{where} needs {memory.peak_bytes / GB:.1f} GB and a device has {plan.limit_bytes / GB:.1f}"
        return f"memory: {needs}; {name} are {largest / GB:.1f} GB of it ({memory.when})"
    waits = [(name, one) for name, one in largest_parts(plan.time.parts) if name != _COMPUTES]
    computes_s, total_s = plan.time.parts[_COMPUTES], plan.time.total_s
    if waits and waits[0][1] > 0.1 * total_s:
        name, seconds = waits[0]
        return f"{name}: {percent(seconds / total_s)} of the step; {percent(computes_s / total_s)} computes"
    return f"compute: {percent(computes_s / total_s)} of the step; HFU {percent(plan.time.hfu)}"


def advise(plan: Plan, now: Candidate, replan: Replan) -> tuple[Advice, ...]:
    """Return the best changes, each of another setting, the best first.

    Of a run that does not fit they are the fastest that do, of others those that are faster by `LEAST_GAIN`.

    Args:
        plan: of the run.
        now: its settings.
        replan: plans others.
    """
    planned = [(changed_keys(now, one), replan(one, {})) for one in neighbours(now, plan)]
    planned += [(zero_keys(keys), replan(now, keys)) for keys in zero_changes(plan)]
    found = [Advice(keys, other) for keys, other in planned if other is not None and other.fits]
    most_s = (1 - LEAST_GAIN) * plan.time.total_s if plan.fits else inf
    best: dict[frozenset[str], Advice] = {}
    for one in sorted(found, key=lambda one: one.plan.time.total_s):
        if one.plan.time.total_s <= most_s:
            best.setdefault(frozenset(change.partition("=")[0] for change in one.changes), one)
    return tuple(best.values())[:MOST_SHOWN]


def neighbours(now: Candidate, plan: Plan) -> Iterator[Candidate]:
    """Yield the settings that differ from a run's in one respect; not all of them are legal."""
    for settings in (
        {"recompute": "none", "keep_attention": False, "offload_activations": False},
        {"recompute": "selective", "keep_attention": False, "offload_activations": False},
        {"recompute": "full", "keep_attention": False, "offload_activations": False},
        {"recompute": "full", "keep_attention": True, "offload_activations": False},
    ):
        yield from _others(now, replace(now, **settings))  # type: ignore[arg-type]
    for size in _halved_and_doubled(now.micro_batch_size):
        yield replace(now, micro_batch_size=size)
    for size in _halved_and_doubled(now.tensor):
        yield replace(now, tensor=size, sequence=size > 1)
    for size in _halved_and_doubled(now.pipeline):
        yield replace(now, pipeline=size)
    if now.tensor > 1 and not now.sequence:
        yield replace(now, sequence=True)
    for size in _halved_and_doubled(now.context):
        yield replace(now, context=size)
    for stage in {max(1, now.zero_stage - 1), min(3, now.zero_stage + 1)} - {now.zero_stage}:
        yield replace(now, zero_stage=stage)
    if now.expert is not None:
        for size in _halved_and_doubled(now.expert):
            yield replace(now, expert=size)
    if not plan.fits and not now.offload_optimizer:
        yield replace(now, offload_optimizer=True)


def zero_changes(plan: Plan) -> Iterator[ZeroKeys]:
    """Yield settings of ZeRO by which data ranks may send less than in a run, as DeepSpeed 0.19.8 acts on them.

    Stages 1 and 2 sum gradients on all data ranks; without `use_multi_rank_bucket_allreduce` each part is summed on the
    one rank that updates it, which halves the bytes. Stage 3 releases a weight that none of the modules within
    `stage3_max_reuse_distance` elements uses, and gathers it again for its next use: those of a large block for its
    forward pass, its recomputation and its backward pass. Beyond `stage3_max_live_parameters` gathered elements it
    gathers nothing ahead.
    """
    given, zero = plan.given, zero_settings(plan.given)
    if given.layout.data * given.layout.context == 1:
        return
    scatters = zero.contiguous_gradients and zero.reduce_scatter and not zero.bf16_sums
    if zero.stage in (1, 2) and scatters and zero.use_multi_rank_bucket_allreduce:
        yield {"use_multi_rank_bucket_allreduce": False}
    if zero.stage != 3 or not plan.fits:
        return
    of_layers = Counter[int]()
    for one in hold_stage(given, 0).parameters:
        of_layers[one.layer] += one.numel
    of_block, of_all = (2 * number for number in (max(of_layers.values()), of_layers.total()))  # there and back
    fitting = int(USED_MEMORY * -plan.missing_bytes / zero.element_bytes)
    for distance in sorted({_two_digits(of_block), _two_digits(min(of_all, fitting))}):
        if distance > zero.max_reuse_distance:
            live = max(distance, zero.max_live_parameters)
            yield {"stage3_max_reuse_distance": distance, "stage3_max_live_parameters": live}


def zero_keys(keys: ZeroKeys) -> tuple[str, ...]:
    """Return settings of ZeRO as overrides of a run file."""
    return tuple(f"deepspeed.zero_optimization.{name}={_yaml(value)}" for name, value in keys.items())


def _two_digits(number: int) -> int:
    """Return the next larger number of two digits and zeros."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return (number // unit + 1) * unit


def _others(now: Candidate, other: Candidate) -> Iterator[Candidate]:
    if other != now:
        yield other


def _halved_and_doubled(number: int) -> list[int]:
    return [number // 2, 2 * number] if number % 2 == 0 else [2 * number]


def changed_keys(now: Candidate, other: Candidate) -> tuple[str, ...]:
    """Return the overrides of a run file that turn one run into another."""
    named = {
        **{f"parallel.{name}": name for name in ("tensor", "pipeline", "context", "expert", "sequence")},
        **{
            f"train.{name}": name
            for name in ("micro_batch_size", "recompute", "keep_attention", "offload_activations", "compile")
        },
        "deepspeed.zero_optimization.stage": "zero_stage",
    }
    found = [f"{key}={_yaml(getattr(other, name))}" for key, name in named.items() if _differ(now, other, name)]
    for name in ("offload_optimizer", "offload_param"):
        if _differ(now, other, name):
            device = "cpu" if getattr(other, name) else "none"
            found.append(f"deepspeed.zero_optimization.{name}.device={device}")
    return tuple(found)


def _differ(now: Candidate, other: Candidate, name: str) -> bool:
    return bool(getattr(now, name) != getattr(other, name))


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
