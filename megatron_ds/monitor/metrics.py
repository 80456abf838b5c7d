"""`metrics.jsonl`: one JSON object per line, written while the run trains, read back bit-equal.

The file is plain JSON lines so that any tool can follow it. A float is written as the shortest text that reads back as
the same double. JSON has no NaN: a value that is not finite becomes null, and the line names it in `non_finite`.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megatron_ds.atomic import replacing
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger
from megatron_ds.monitor.line_file import LineFile
from megatron_ds.untrusted import is_missing, parse_json, read_lines
from megatron_ds.untrusted.limits import RUN_LINE

MOST_WAITING = 1_000
"""Lines that may wait for room on a full disk, a quarter of an hour of steps of one second; with more the run ends."""

MOE = "moe_"
"""Prefix of the metrics of mixtures of experts; see `engine.router_load`."""

MOE_TOKENS_MIN, MOE_TOKENS_MEAN, MOE_TOKENS_MAX = (f"{MOE}tokens_{name}" for name in ("min", "mean", "max"))
"""Tokens of a step that the experts of a layer got: the fewest and the most of any expert, and the mean."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Results of one logged optimizer step.

    Attributes:
        step: number of optimizer steps so far, this one included (1-based).
        loss: mean loss per labelled token of the global batch, in nats.
        grad_norm: global L2 norm of the gradients before clipping.
        lr: learning rate of the step.
        samples: number of samples of the global batch; None = all steps have as many.
        seq_length: tokens of the rows that samples are cut into; None = they are never cut.
        lrs: those of `optimizer.groups` that have one of their own, by their patterns.
        tokens: number of labelled tokens in the global batch.
        step_s: Wall-clock seconds of the step.
        tokens_per_s: labelled tokens per second over all ranks.
        tflops_per_rank: model TFLOP/s of one rank (1e12 floating-point operations per second), over all positions of
            the batch, padding included.
        data_s: seconds of `step_s` that rank 0 waited for its part of the batch to be read; None = not measured.
        mfu: `tflops_per_rank` divided by the peak of the device, 0 to 1; None = that peak is unknown.
        peak_memory_bytes: peak of rank 0 since the last logged step, see `PeakMemory`; None = not measured.
        reserved_memory_bytes: the same of what torch's allocator held; None = not on a GPU.
        terms: the loss terms by name if there are several; else empty.
        metrics: the objective's metrics by name, averaged over the global batch, and those of mixtures of experts.
        system: readings of rank 0's machine by name, see `system.SystemMeter`; empty = not read.
        ranks: times of all ranks in the last steps, see `stragglers.Stragglers.numbers`; empty = not measured.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step_s: float
    tokens_per_s: float
    tflops_per_rank: float
    data_s: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    reserved_memory_bytes: int | None = None
    samples: int | None = None
    seq_length: int | None = None
    lrs: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    system: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)

    @property
    def expert_loads(self) -> tuple[float, float] | None:
        """Tokens of the least and of the busiest expert of any layer, divided by the mean; None = not measured."""
        fewest, mean, most = (self.metrics.get(name) for name in (MOE_TOKENS_MIN, MOE_TOKENS_MEAN, MOE_TOKENS_MAX))
        if fewest is None or most is None or not mean:
            return None
        return fewest / mean, most / mean


@dataclass(frozen=True, slots=True)
class ValidMetrics:
    """Validation after `step` optimizer steps.

    Attributes:
        step: number of optimizer steps so far.
        valid_loss: mean loss per labelled token, in nats.
        metrics: the objective's metrics by name, averaged over the validation data; those of a named set are called
            `set/metric`.
        valid_losses: the loss on each named set.
    """

    step: int
    valid_loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    valid_losses: Mapping[str, float] = field(default_factory=dict)


Metrics = StepMetrics | ValidMetrics
_INT_FIELDS = frozenset({"step", "tokens", "samples", "seq_length", "peak_memory_bytes", "reserved_memory_bytes"})
_MAPPINGS = ("lrs", "terms", "metrics", "system", "ranks", "valid_losses")
"""Fields that are written only if they are not empty."""
_OPTIONAL = frozenset({"data_s", "mfu", "peak_memory_bytes", "reserved_memory_bytes", "samples", "seq_length"})
"""Numbers that files of earlier versions lack, that are unknown on the run's device, or equal in all steps."""


class LastSteps(NamedTuple):
    """Numbers of the last steps of which a file has the results; 0 = it has none.

    Attributes:
        step: the last training step.
        valid: the step of the last validation.
    """

    step: int = 0
    valid: int = 0

    def includes(self, metrics: Metrics) -> bool:
        """Return whether the file has results of this kind of this step, or of a later one."""
        return metrics.step <= (self.step if isinstance(metrics, StepMetrics) else self.valid)

    def after(self, metrics: Metrics) -> "LastSteps":
        """Return the last steps when these results have been added."""
        if isinstance(metrics, StepMetrics):
            return self._replace(step=max(self.step, metrics.step))
        return self._replace(valid=max(self.valid, metrics.step))


class MetricsWriter:
    """Writer of a JSON-lines file of metrics. Each line is written at once; on a full disk lines wait, see `LineFile`.

    A new run starts a new file: a file of an earlier run is renamed to `metrics.<n>.jsonl` (n = 1, 2, ... in the
    order of the runs), never overwritten. A resumed run appends to the existing file.

    Args:
        path: the file; its directory is created if missing.
        continue_after: the step that the run resumes from; None for a new run. Lines of later steps, which will be run
            again, and what a crash has torn or damaged are removed; the former file is then kept as
            `metrics.<n>.jsonl`.

    Attributes:
        found: the last steps that the file had before lines were removed.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path | str, continue_after: int | None = None) -> None:
        self.path, self.found = Path(path), LastSteps()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > 0:
            if continue_after is None:
                self.path.rename(archive_name(self.path))
            else:
                self.found = _cut_after(self.path, continue_after)
        self.path.touch()
        self._file = LineFile(self.path)

    @property
    def unwritten(self) -> str | None:
        """The reason why more than `MOST_WAITING` lines wait, in words; None = fewer do."""
        if self._file.num_waiting <= MOST_WAITING:
            return None
        return f"{self._file.num_waiting:,} lines of {self.path} wait to be written ({self._file.reason})"

    def write(self, metrics: Metrics) -> None:
        """Append one line."""
        self._file.add(_encode(metrics) + "\n")

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def iter_metrics(path: Path | str) -> Iterator[Metrics]:
    """Yield the lines of a metrics file in order; a null is read as NaN, unknown fields are ignored.

    A last line without a newline was torn by a crash, or is still being written: it is left out.

    Raises:
        DataError: the file is missing, or a complete line is not metrics.
    """
    path = Path(path)
    for number, line in enumerate(_read_lines(path), start=1):
        yield _decode(line, path, number)


def read_metrics(path: Path | str) -> tuple[list[StepMetrics], list[ValidMetrics]]:
    """Return all training and all validation lines of a metrics file; see `iter_metrics`."""
    steps: list[StepMetrics] = []
    valid: list[ValidMetrics] = []
    for metrics in iter_metrics(path):
        if isinstance(metrics, StepMetrics):
            steps.append(metrics)
        else:
            valid.append(metrics)
    return steps, valid


def _encode(metrics: Metrics) -> str:
    record: dict[str, Any] = {}
    non_finite: list[str] = []
    for name in _number_fields(type(metrics)):
        value = getattr(metrics, name)
        if value is None and name in _OPTIONAL:
            continue
        # JSON cannot encode numpy and torch scalars; their float() is exact
        number = int(value) if name in _INT_FIELDS else float(value)
        if not math.isfinite(number):
            non_finite.append(name)
        record[name] = number if math.isfinite(number) else None
    for name in _MAPPINGS:
        if values := getattr(metrics, name, None):
            record[name] = {key: float(value) if math.isfinite(value) else None for key, value in values.items()}
    if non_finite:
        record["non_finite"] = non_finite
    return json.dumps(record, allow_nan=False)


def _decode(line: bytes, path: Path, number: int) -> Metrics:
    try:
        record = parse_json(line.decode("utf-8"), "", RUN_LINE, DataError)
        kind = ValidMetrics if "valid_loss" in record else StepMetrics
        values: dict[str, Any] = {
            name: _number(name, record[name])
            for name in _number_fields(kind)
            if name in record or name not in _OPTIONAL
        }
        for name in _MAPPINGS:
            if name in record and name in kind.__dataclass_fields__:
                values[name] = {key: _float(value) for key, value in record[name].items()}
        return kind(**values)
    except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
        shown = line.decode("utf-8", "replace").strip()[:80]
        raise DataError(f"{path}, line {number} is no line of metrics: {shown!r}") from error


def _number_fields(kind: type[Metrics]) -> list[str]:
    return [one.name for one in fields(kind) if one.name not in _MAPPINGS]


def _number(name: str, value: float | None) -> float:
    if name in _INT_FIELDS:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(name)
        return value
    return _float(value)


def _float(value: float | None) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _read_lines(path: Path) -> Iterator[bytes]:
    """Yield the complete lines."""
    try:
        for line in read_lines(path, RUN_LINE, DataError):
            if line.endswith(b"\n"):
                yield line
    except DataError as problem:
        if is_missing(problem):
            raise DataError(f"{path} does not exist; a run writes it as OUTPUT/metrics.jsonl") from None
        raise


def _cut_after(path: Path, step: int) -> LastSteps:
    """Keep only the complete lines up to `step`; the former file is kept under another name if it differs.

    Returns:
        the last steps of the former file.
    """
    kept, last, damaged = [], LastSteps(), list[DataError]()
    try:
        for number, line in enumerate(_read_lines(path), start=1):
            try:
                metrics = _decode(line, path, number)
            except DataError as problem:  # a record that a crash has damaged must not keep a run from its checkpoint
                damaged.append(problem)
                continue
            last = last.after(metrics)
            if metrics.step <= step:
                kept.append(line)
    except DataError as problem:  # a line without an end: nothing after it can be read
        damaged.append(problem)
    text = b"".join(kept)
    if len(text) != path.stat().st_size:
        former = archive_name(path)
        with replacing(path) as temporary:
            temporary.write_bytes(text)
            shutil.copyfile(path, former)  # a copy, so that the file itself always exists
        if damaged:
            more = f", and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
            get_logger().warning("%s%s; left out, the former file is %s", damaged[0], more, former.name)
    return last


def archive_name(path: Path) -> Path:
    """Return such as `metrics.<n>.jsonl`, n one above the largest in use, so that numbers follow the order of runs."""
    prefix, suffix = f"{path.stem}.", path.suffix
    names = (other.name for other in path.parent.iterdir())
    middles = (name[len(prefix) : -len(suffix) or None] for name in names if name.startswith(prefix))
    taken = [int(middle) for middle in middles if middle.isdecimal()]
    return path.with_name(f"{prefix}{max(taken, default=0) + 1}{suffix}")
