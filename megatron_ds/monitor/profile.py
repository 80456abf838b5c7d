"""Time of a step by parts of the model, summed from a Chrome trace of torch's profiler.

Operations of the forward pass are inside annotations of `parallel.regions`; the trace links operations of the backward
pass to them. On a CPU the time of a part is that of the threads that compute it; on a GPU that of its kernels.
Communication is hidden while computation runs at the same time, and exposed otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ds.parallel.regions import (
    BLOCK,
    DATA,
    DISPATCH,
    EXPERTS,
    NEIGHBOURS,
    OPTIMIZER,
    PARTS,
    PREFIX,
    ROUTER,
    STEP,
)

Span = tuple[float, float]

OTHER, EXPOSED, HIDDEN = "other", "communication, exposed", "communication, hidden"
ROWS = (*PARTS, EXPOSED, OTHER)
"""The parts whose times add up to a step; hidden communication is not among them."""

_OF_EXPERTS = (ROUTER, DISPATCH, EXPERTS)
_BACKWARD = "autograd::engine::evaluate_function: "
_OPTIMIZER_STEP = "Optimizer.step#"
_COMPILED = "Torch-Compiled Region"
_BACKENDS = ("gloo:", "nccl:", "mpi:", "ucc:", "deepspeed::inference_all_reduce", NEIGHBOURS)
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class PartTimes:
    """Times of one rank, averaged over the recorded steps.

    Attributes:
        seconds: seconds per step, by the names in `ROWS`.
        hidden_s: seconds per step of communication during computation.
        steps: number of recorded steps.
    """

    seconds: Mapping[str, float]
    hidden_s: float
    steps: int

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


def time_by_part(trace: Mapping[str, Any]) -> PartTimes:
    """Sum up a Chrome trace, whose steps are annotations called `regions.STEP`."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    recorded = [_span(event) for event in events if event["name"] == STEP and event.get("cat") == "user_annotation"]
    steps = _merged(recorded)
    threads = _threads(events)
    labelled = _label(threads, trace["traceEvents"])
    kernels = [event for event in events if event.get("cat") in _KERNELS]
    by_part: dict[str, list[Span]] = defaultdict(list)
    if kernels:
        part_of = {event["args"]["External id"]: label for event, label, _ in labelled if _has_id(event)}
        communication = _merged(_span(event) for event in kernels if "nccl" in event["name"].lower())
        for event in kernels:
            if "nccl" not in event["name"].lower():
                label = part_of.get(event["args"]["External id"]) if _has_id(event) else None
                by_part[label or OTHER].append(_span(event))
        busy = _merged(span for spans in by_part.values() for span in spans)
        by_part[DATA] = _without(_own(labelled, DATA), busy)
    else:
        communication = _merged(_span(event) for event in events if event["name"].startswith(_BACKENDS))
        for _, label, own in labelled:
            by_part[label or OTHER].extend(own)
        busy = _merged(_span(event) for event, _, own in labelled if _computes(event, own))
    exposed = _common(_without(communication, busy), steps)
    seconds = {name: _length(_common(_without(_merged(by_part[name]), exposed), steps)) / 1e6 for name in PARTS}
    seconds[EXPOSED] = _length(exposed) / 1e6
    seconds[OTHER] = max(0.0, _length(steps) / 1e6 - sum(seconds.values()))
    count = max(1, len(recorded))
    hidden = _length(_common(_common(communication, busy), steps)) / 1e6
    return PartTimes({name: seconds[name] / count for name in ROWS}, hidden / count, count)


def table(ranks: Sequence[PartTimes]) -> list[str]:
    """Return lines of a table: each part's mean over ranks, its fraction of the step, and the largest with its rank.

    A model without experts has no rows of their parts.
    """
    step_s = sum(one.step_s for one in ranks) / len(ranks)
    lines = [f"{'':24}{'mean s':>10}{'share':>8}{'largest s':>11}  rank"]
    for name in (*ROWS, "step"):
        values = [one.step_s if name == "step" else one.seconds[name] for one in ranks]
        if name in _OF_EXPERTS and not any(values):
            continue
        lines.append(_line(name, values, step_s))
    return [*lines, _line(f"({HIDDEN})", [one.hidden_s for one in ranks], step_s)]


def _line(name: str, values: Sequence[float], step_s: float) -> str:
    mean, largest = sum(values) / len(values), max(values)
    share = mean / step_s if step_s else 0.0
    return f"{name:24}{mean:>10.4f}{share:>8.1%}{largest:>11.4f}  {values.index(largest)}"


# ---- events ----------------------------------------------------------------------------------------------------------


_Labelled = tuple[Mapping[str, Any], str | None, list[Span]]
"""An event, its part, and the spans in which no nested event ran."""


def _threads(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the events of the threads that train, in each thread in the order in which they nest.

    The copies of an exchange through memory are left out: they are communication.
    """
    by_thread: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    exchanged: dict[Any, float] = defaultdict(float)  # the end of the last exchange of each thread
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["name"] == NEIGHBOURS:
            exchanged[event["tid"]] = event["ts"] + event["dur"]
        if event.get("cat") not in ("cpu_op", "user_annotation") or event["name"].startswith(_BACKENDS):
            continue
        if event["ts"] >= exchanged[event["tid"]]:
            by_thread[event["tid"]].append(event)
    return [thread for thread in by_thread.values() if any(_is_of_a_step(event) for event in thread)]


def _has_id(event: Mapping[str, Any]) -> bool:
    """Return whether an event has the id that connects a kernel with the operation that started it."""
    return "External id" in event.get("args", {})


def _is_of_a_step(event: Mapping[str, Any]) -> bool:
    return event["name"] == STEP or event["name"].startswith(_BACKWARD)


def _label(threads: Sequence[Sequence[Mapping[str, Any]]], everything: Iterable[Mapping[str, Any]]) -> list[_Labelled]:
    """Label events in two passes: parts of the forward pass, then with them those of the backward pass."""
    sources = {event["id"]: (event["tid"], event["ts"]) for event in everything if _is_flow(event, "s")}
    forward_of = {(event["tid"], event["ts"]): sources.get(event["id"]) for event in everything if _is_flow(event, "f")}
    first = {(event["tid"], event["ts"]): label for event, label, _ in _walk(threads, {})}
    known = {place: first.get(source) if source else None for place, source in forward_of.items()}
    return list(_walk(threads, known))


def _is_flow(event: Mapping[str, Any], end: str) -> bool:
    return event.get("cat") == "fwdbwd" and event.get("ph") == end


def _walk(threads: Sequence[Sequence[Mapping[str, Any]]], known: Mapping[Any, str | None]) -> Iterable[_Labelled]:
    """Yield each event with its part, its own or that of the event around it.

    Args:
        threads: nested events.
        known: (thread, begin) of an operation of a backward pass -> the part of its forward pass.
    """
    for thread in threads:
        stack: list[tuple[float, str | None, list[Span], Mapping[str, Any]]] = []
        for event in thread:
            begin, end = _span(event)
            while stack and begin >= stack[-1][0]:
                yield _closed(stack)
            outer = stack[-1][1] if stack else None
            if stack:
                _cut(stack[-1][2], begin, end)
            label = _own_part(event) or known.get((event["tid"], event["ts"])) or outer
            stack.append((end, label, [(begin, end)], event))
        while stack:
            yield _closed(stack)


def _closed(stack: list[tuple[float, str | None, list[Span], Mapping[str, Any]]]) -> _Labelled:
    _, label, own, event = stack.pop()
    return event, label, own


def _cut(own: list[Span], begin: float, end: float) -> None:
    """Remove the span of a nested event from the own spans of the event around it."""
    first, last = own.pop()
    own.extend(span for span in ((first, begin), (end, last)) if span[1] > span[0] or span[1] == last)


def _own_part(event: Mapping[str, Any]) -> str | None:
    name: str = event["name"]
    if name.startswith(PREFIX):
        return name[len(PREFIX) :]
    if name.startswith(_OPTIMIZER_STEP):
        return OPTIMIZER
    return BLOCK if name.startswith(_COMPILED) else None


def _computes(event: Mapping[str, Any], own: Sequence[Span]) -> bool:
    """Return whether an event is an operation without nested operations."""
    return event.get("cat") == "cpu_op" and event["name"].startswith("aten::") and len(own) == 1


def _own(labelled: Iterable[_Labelled], part: str) -> list[Span]:
    return _merged(span for _, label, own in labelled if label == part for span in own)


# ---- spans -----------------------------------------------------------------------------------------------------------


def _span(event: Mapping[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Return the spans in order, without overlaps."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > begin:
            merged.append((begin, end))
    return merged


def _common(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """Return the intersection of two merged lists."""
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if end > begin:
            found.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found


def _without(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """Return the spans of the first merged list without those of the second."""
    gaps, before = [], float("-inf")
    for begin, end in right:
        gaps.append((before, begin))
        before = end
    return _common(left, [*gaps, (before, float("inf"))])


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)
