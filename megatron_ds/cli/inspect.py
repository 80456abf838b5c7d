"""`megatron-ds inspect`: what a checkpoint, a folder of them, or a Hugging Face directory holds."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_ds.checkpoint.inspect import CheckpointFacts, FileFacts, FolderFacts, ModelFacts
    from megatron_ds.checkpoint.progress import Origin, Progress

HELP = """Show what a checkpoint, a folder of checkpoints, a run's output or a Hugging Face directory holds.

Every file of a checkpoint is read and compared with its checksum; exit status 1 if one is missing or damaged.

Examples:

\b
  megatron-ds inspect out/run
  megatron-ds inspect out/run/checkpoints/step_00000200 --json
"""
WIDTH = 12

Row = tuple[str, str]
"""What, and what it is."""


def inspect(
    path: Annotated[Path, typer.Argument(help="What is looked at.", metavar="PATH")],
    fast: Annotated[bool, typer.Option("--fast", help="Look at the files' lengths, not at their bytes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Inspect; see HELP."""
    from megatron_ds.checkpoint.inspect import FolderFacts, as_json
    from megatron_ds.checkpoint.inspect import inspect as look

    facts = look(path, fast=fast)
    if json:
        print(json_module.dumps(as_json(facts), indent=2))
    else:
        _show(_folder(facts) if isinstance(facts, FolderFacts) else _checkpoint(facts))
    whole = facts.checkpoints if isinstance(facts, FolderFacts) else (facts,)
    if any(one.problems for one in whole):
        raise typer.Exit(1)


def written(path: Path) -> str:
    """One line on a directory that was just written."""
    from megatron_ds.checkpoint.inspect import inspect_model

    model = inspect_model(path)
    return f"{path}: {_model_words(model)}, {_files_words(model.files)}"


def _show(rows: Iterable[Row]) -> None:
    """A table on a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if not console.is_terminal:
            print(f"{name:<{WIDTH}}{value}".rstrip())
        table.add_row(Text(name), Text(value, style="bold red" if "DAMAGED" in name + value else ""))
    if console.is_terminal:
        console.print(table)


def _folder(facts: FolderFacts) -> Iterator[Row]:
    yield ("checkpoints", facts.path)
    for one in facts.checkpoints:
        name = Path(one.path).name
        mark = " (latest)" if name == facts.latest else ""
        when = f", written {one.origin.written_at}" if one.origin is not None else ""
        size = f", {_size(one.bytes)}" if one.bytes else ""
        yield ("", f"{name}  {_verdict(one)}{size}{when}{mark}")
        yield from (("", f"  {problem}") for problem in one.problems)
    if facts.latest not in {Path(one.path).name for one in facts.checkpoints}:
        what = "is missing" if facts.latest is None else f"names {facts.latest}, which is not there"
        yield ("latest", f"{what}; a run goes on from the newest that is whole")
    whole = [one for one in facts.checkpoints if not one.problems]
    if whole:
        yield ("", "")
        yield from _checkpoint(whole[0])


def _checkpoint(facts: CheckpointFacts) -> Iterator[Row]:
    yield ("path", facts.path)
    if facts.model is not None:
        yield ("model", _model_words(facts.model))
        yield ("weights", _files_words(facts.model.files))
    if facts.progress is not None and facts.origin is not None:
        yield from _progress(facts.progress, facts.origin)
        if not facts.progress.trained:
            yield ("state", "none: nothing was trained")
    if facts.state_files:
        kinds = ", ".join(f"{kind} {_count(number)}" for kind, number in facts.state.items())
        yield ("state", f"{kinds}; {_files_words(facts.state_files)}")
    if facts.progress is not None and not facts.problems:
        yield ("whole", _verdict(facts).removeprefix("whole, ").removeprefix("whole "))
    for problem in facts.problems:
        yield ("DAMAGED", problem)


def _progress(progress: Progress, origin: Origin) -> Iterator[Row]:
    skipped = progress.step - progress.applied
    yield ("step", f"{progress.step:,}{f', of which {skipped:,} were skipped' if skipped else ''}")
    data = progress.data
    if data.fingerprint:
        yield ("data", f"{data.samples:,} samples taken of {data.description}")
        order = "shuffled" if data.shuffle else "in order"
        yield ("", f"seq_length {data.seq_length}, {order}, seed {data.seed}, {data.fingerprint[:12]}")
    yield ("written", f"{origin.written_at} by {origin.source}")
    if progress.trained:
        sequence = ", sequence parallel" if origin.sequence else ""
        yield (
            "layout",
            f"{origin.world_size} = tp {origin.tensor} x pp {origin.pipeline} x dp {origin.data}{sequence}, "
            f"ZeRO-{origin.zero_stage}, {origin.precision}; it goes on at any other",
        )


def _verdict(facts: CheckpointFacts) -> str:
    if facts.problems:
        return f"DAMAGED ({len(facts.problems)} file{'s' if len(facts.problems) > 1 else ''})"
    return "whole, every checksum is right" if facts.checked else "whole by the lengths of its files"


def _model_words(model: ModelFacts) -> str:
    types = ", ".join(sorted(model.dtypes))
    return f"{model.model_type} ({model.architecture}), {_count(model.num_params)} parameters, {types}"


def _files_words(files: tuple[FileFacts, ...]) -> str:
    tensors, total = sum(file.tensors for file in files), sum(file.bytes for file in files)
    number = f"{len(files)} file{'s' if len(files) != 1 else ''}"
    return f"{number}, {tensors:,} tensors, {_size(total)}"


def _count(number: float) -> str:
    from megatron_ds.cli.display import format_count

    return format_count(number)


def _size(num_bytes: int) -> str:
    return f"{_count(num_bytes)}B" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
