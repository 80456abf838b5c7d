"""Summary of a Chrome trace: the kernels that take the time, and the share in which the device is busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
NUM_KERNELS = 16
LONGEST_NAME = 120


def summarize(events: Iterable[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Return the busy share, the number of kernels of a step and the longest ones, from events of a Chrome trace.

    Returns:
        `busy`: fraction of the time between the first and the last kernel in which one runs; `kernels_a_step`;
        `kernels`: [name, ms a step, calls a step] of the longest.
    """
    spans: list[tuple[float, float]] = []
    time_us, calls = Counter[str](), Counter[str]()
    for event in events:
        if event.get("cat") in ON_DEVICE:
            spans.append((event["ts"], event["ts"] + event["dur"]))
            time_us[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    if not spans:
        return {"busy": None, "kernels_a_step": 0, "kernels": []}
    spans.sort()
    busy_us, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy_us += max(0.0, stop - max(start, end))
        end = max(end, stop)
    kernels = [
        [name[:LONGEST_NAME], round(total / steps / 1e3, 3), round(calls[name] / steps, 1)]
        for name, total in time_us.most_common(NUM_KERNELS)
    ]
    return {
        "busy": round(busy_us / (end - spans[0][0]), 4),
        "kernels_a_step": len(spans) // steps,
        "kernels": kernels,
    }
