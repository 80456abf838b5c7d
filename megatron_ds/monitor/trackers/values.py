"""The numbers of a line of metrics and the settings of a run, by the names that trackers show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_ds.config import dump_run
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.monitor.metrics import Metrics, StepMetrics
from megatron_ds.monitor.sinks import SinkInfo

Setting = str | bool | int | float

_PREFIXES = {"valid_losses": "losses/", "metrics": "", "system": "system/"}
"""Prefixes of the names in a mapping of metrics; another mapping's is its own name.

No prefix is the name of a number: in MLflow's directories `valid/loss` is a file, and can have nothing below it.
"""


class Line(NamedTuple):
    """The numbers of a step or of a validation, by name."""

    step: int
    values: Mapping[str, float]


def line_of(metrics: Metrics) -> Line:
    """Return the numbers of a line of metrics as `train/loss`, `valid/loss`, `system/gpu0_power_watts`, ...

    A value that is unknown on the run's device is left out.
    """
    kind = "train/" if isinstance(metrics, StepMetrics) else "valid/"
    values: dict[str, float] = {}
    for name in type(metrics).__dataclass_fields__:
        value = getattr(metrics, name)
        if isinstance(value, Mapping):
            prefix = _PREFIXES.get(name, f"{name}/")
            group = prefix if name == "system" else f"{kind}{prefix}"
            values |= {f"{group}{key}": float(one) for key, one in value.items()}
        elif value is not None and name != "step":
            values[f"{kind}{name.removeprefix('valid_')}"] = float(value)
    return Line(metrics.step, values)


def name_of_run(info: SinkInfo, given: str | None) -> str:
    """Return the name that the user gave to the tracker's run, or that of the output directory."""
    return given or info.output.resolve().name


def nested_settings(info: SinkInfo) -> dict[str, Any]:
    """Return the resolved run file as nested mappings."""
    content = parse_yaml(dump_run(info.run), "the run file")
    assert isinstance(content, dict), content
    return content


def flat_settings(info: SinkInfo) -> dict[str, Setting]:
    """Return the resolved run file by dotted keys; lists become text."""
    return dict(_leaves("", nested_settings(info)))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Setting]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value if isinstance(value, Setting) else json.dumps(value, default=str)
