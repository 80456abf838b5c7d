"""The limit of a run, and the one change of its settings that helps most, found by planning each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_ds.planner.plan import GB, Plan, largest_parts
from megatron_ds.planner.plan_values import percent
from megatron_ds.planner.search.space import Candidate

LEAST_GAIN = 0.02
"""Share of a step by which a change must be faster to be advised: smaller ones are within the plan's error."""

Replan = Callable[[Candidate], Plan | None]
"""Candidate -> its plan; None = `train` would refuse it."""

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


def advise(plan: Plan, now: Candidate, replan: Replan) -> Advice | None:
    """Return the best single change: for a run that does not fit, the fastest that does; else one that is faster.

    Args:
        plan: of the run.
        now: its settings.
        replan: plans others.
    """
    found = []
    for candidate in neighbours(now, plan):
        other = replan(candidate)
        if other is not None and other.fits:
            found.append(Advice(changed_keys(now, candidate), other))
    best = min(found, key=lambda one: one.plan.time.total_s, default=None)
    if best is None or (plan.fits and best.plan.time.total_s > (1 - LEAST_GAIN) * plan.time.total_s):
        return None
    return best


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
