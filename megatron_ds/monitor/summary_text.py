"""A run's facts, counts and durations as text, on the terminal and in `report.html`."""

import math

from megatron_ds.monitor.reporter import RunSummary


def summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """Return the start-up summary as (name, value) pairs."""
    world = (
        f"{summary.world_size} = tp {summary.tensor}{f' x cp {summary.context}' if summary.context > 1 else ''}"
        f" x pp {summary.pipeline} x dp {summary.data}"
        f"{', sequence parallel' if summary.sequence else ''}"
    )
    tokens = round(summary.tokens_per_step * summary.full_batches(summary.steps))
    statement = (("learned", summary.learned), ("validated", summary.validated), ("kept", summary.kept))
    params = f"{format_count(summary.num_params)} parameters ({summary.num_params:,})"
    if summary.num_active_params not in (None, summary.num_params):
        params += f", {format_count(summary.num_active_params)} active"
    return [
        ("model", f"{summary.model_name}, {params}"),
        *((("experts", summary.experts),) if summary.experts else ()),
        ("world", world),
        *((("context", summary.context_plan),) if summary.context_plan else ()),
        ("deepspeed", f"ZeRO stage {summary.zero_stage}, {summary.precision}"),
        ("device", summary.device),
        (
            "steps",
            f"{summary.steps:,} of {_step_tokens(summary)} tokens ({format_count(tokens)} in total){_rows(summary)}",
        ),
        ("data", summary.data_description),
        *((name, text) for name, text in statement if text),
        ("output", summary.output),
    ]


def _step_tokens(summary: RunSummary) -> str:
    """Return the tokens of a step, such as `65,536`, or `8,192 (step 1) to 65,536 (step 70 on)` of a batch ramp."""
    if summary.batch_sizes is None:
        return f"{summary.tokens_per_step:,}"
    first, last = summary.batch_sizes.stages[0], summary.batch_sizes.stages[-1]
    least = summary.tokens_per_step * first.size // last.size
    return f"{least:,} (step 1) to {summary.tokens_per_step:,} (step {last.first_step:,} on)"


def _rows(summary: RunSummary) -> str:
    """Return text about the rows of a length ramp, such as `, in rows of 64 (step 1) to 512 (step 1,001 on)`."""
    if len(summary.row_lengths) < 2:
        return ""
    first, last = summary.row_lengths[0], summary.row_lengths[-1]
    return f", in rows of {first.length:,} (step 1) to {last.length:,} (step {last.first_step:,} on)"


def format_count(count: float) -> str:
    """Format a count in few characters: 512, 1.5K, 109.5M, 7.0B, 1.2T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


def format_duration(seconds: float) -> str:
    """Format seconds as H:MM:SS, with any number of hours; `-:--:--` if unknown."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest_s:02d}"
