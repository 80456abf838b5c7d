"""Run files of the layouts that a search found, which `train` starts as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ds.atomic import replacing
from megatron_ds.config import RunConfig, build_run, dump_run
from megatron_ds.config.yaml_text import format_yaml, parse_yaml
from megatron_ds.errors import ConfigError
from megatron_ds.planner.search.branch_and_bound import GB, FoundLayout


def write_layouts(found: Sequence[FoundLayout], directory: Path, world_size: int, tokens_per_step: int) -> list[Path]:
    """Write a run file for each layout, and return their paths in the same order.

    A file holds the keys of the searched run file, with those of the layout changed.

    Args:
        found: the fastest first.
        directory: made if it does not exist.
        world_size: number of ranks that the layouts are for.
        tokens_per_step: of all ranks.

    Raises:
        ConfigError: the directory cannot be made, or has one of the files.
    """
    paths = [directory / f"{number}_{_name(one)}.yaml" for number, one in enumerate(found, 1)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(
            f"--write={directory} cannot be made: {problem.strerror or problem}; choose another directory"
        ) from problem
    there = next((path for path in paths if path.exists()), None)
    if there is not None:
        raise ConfigError(f"--write={directory} holds {there.name} already; choose another directory")
    for path, one in zip(paths, found):
        heading = _heading(one, world_size, tokens_per_step)
        with replacing(path) as temporary:
            temporary.write_text("".join(f"# {line}\n" for line in heading) + run_text(one.run), encoding="utf-8")
    return paths


def run_text(run: RunConfig) -> str:
    """Return YAML text of a run with the keys that it was given, which `load_run` reads back to an equal run."""
    text = format_yaml(_given(run.model_dump(exclude_unset=True)))
    mapping = parse_yaml(text, "the run file")
    return text if build_run(mapping) == run else dump_run(run)


def _given(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping without the keys that stand for nothing given; DeepSpeed's and the model's stay as they are."""
    found = {}
    for name, value in mapping.items():
        if isinstance(value, dict) and name not in ("deepspeed", "config"):
            value = _given(value)
        if value is not None:
            found[name] = value
    return found


def _name(found: FoundLayout) -> str:
    """Return text such as `tensor_8_pipeline_4_zero_1`."""
    tensor, pipeline, context, expert, stage = found.candidate.layout
    sizes = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert or 1}
    return "_".join([*(f"{name}_{size}" for name, size in sizes.items() if size > 1), f"zero_{stage}"])


def _heading(found: FoundLayout, world_size: int, tokens_per_step: int) -> list[str]:
    estimate, data = found.estimate, world_size // found.candidate.model_ranks
    host = f" and {estimate.host_bytes / GB:.1f} GB of its host's" if estimate.host_bytes else ""
    return [
        f"{found.candidate.describe()}; {data} data ranks: {world_size} ranks.",
        f"Planned: {estimate.step_s:.4g} s a step, {tokens_per_step / estimate.step_s:,.0f} tokens/s, "
        f"{estimate.device_bytes / GB:.1f} GB on the fullest device{host}.",
    ]
