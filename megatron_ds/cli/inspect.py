"""`megatron-ds inspect`: show the content of checkpoints, Hugging Face directories and data."""

from __future__ import annotations

import io
import json as json_module
import sys
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.cli.table import Row, count, show_rows, size
from megatron_ds.paths import expanded, expanded_text

if TYPE_CHECKING:
    from megatron_ds.checkpoint.inspect import (
        AdapterFacts,
        CheckpointFacts,
        FolderFacts,
        ModelFacts,
        PassedThroughFacts,
        TensorFileFacts,
    )
    from megatron_ds.checkpoint.progress import Origin, Progress

HELP = """Show the content of a checkpoint, a run's output, a Hugging Face directory or data.

PATH is a directory, or data: a run file (its training data, as the run reads them), the prefix of indexed files
(.bin and .idx), or with --tokenizer files of text or conversations: a file of any kind that train reads, a pattern
such as 'parts/*.jsonl.gz', or a directory saved by datasets. For data, the first samples are shown as text: tokens with
loss are green on a terminal, and between the marks \u27e6 and \u27e7 elsewhere.

Checksums of all files are verified; the exit status is 1 if a file is missing or damaged.

Examples:

\b
  megatron-ds inspect out/run
  megatron-ds inspect out/run/checkpoints/step_00000200 --json
  megatron-ds inspect run.yaml data.packing=true --samples 5
  megatron-ds inspect corpus --tokenizer hf_dir
  megatron-ds inspect chat.jsonl --tokenizer hf_dir
"""


def inspect(
    path: Annotated[Path, typer.Argument(help="The directory or data to inspect.", metavar="PATH", parser=expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values that override those of a run file.", metavar="key.sub=value")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Check file lengths instead of checksums.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", parser=expanded_text, help="Tokenizer that shows data as text; a run file names its own."
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out malformed rows of text files; a run file has data.bad_rows.")
    ] = False,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Number of samples or documents to show.")] = 2,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    load_plugins(imports)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # data may hold characters that the terminal lacks
    kind = _kind_of(path)
    if overrides and kind != "run":
        raise typer.BadParameter(
            f"{overrides[0]}: only values of a run file can be overridden, and {path} is not a run file"
        )
    if tokenizer is not None and kind in ("run", "directory"):
        raise typer.BadParameter(
            "--tokenizer works with indexed data and text files only"
            + ("; a run names its own: model.tokenizer=DIR" if kind == "run" else "")
        )
    if skip_bad and kind != "file":
        raise typer.BadParameter(
            "--skip-bad works with text files only"
            + ("; for a run file, add data.bad_rows=skip" if kind == "run" else "")
        )
    if kind == "directory":
        is_intact = _directory(path, fast, json)
    else:
        from megatron_ds.cli import inspect_data

        if kind == "run":
            is_intact = inspect_data.run(path, overrides or [], samples, json)
        elif kind == "indexed":
            is_intact = inspect_data.indexed(path, fast, tokenizer, samples, json)
        else:
            is_intact = inspect_data.file(path, tokenizer, samples, json, skip_bad)
    if not is_intact:
        raise typer.Exit(1)


def _kind_of(path: Path) -> Literal["run", "indexed", "file", "directory"]:
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return "run"
    if Path(f"{path}.idx").is_file() or (not path.is_dir() and path.suffix in (".bin", ".idx")):
        return "indexed"
    is_saved_table = any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
    is_pattern = has_magic(str(path)) and not path.exists()
    return "file" if path.is_file() or is_pattern or is_saved_table else "directory"


def _directory(path: Path, fast: bool, json: bool) -> bool:
    """Show a directory of checkpoints or a model. Return True if all of it is intact."""
    from megatron_ds.checkpoint.inspect import FolderFacts, as_json
    from megatron_ds.checkpoint.inspect import inspect as look

    facts = look(path, fast=fast)
    if json:
        print(json_module.dumps(as_json(facts), indent=2))
    else:
        show_rows(_folder(facts) if isinstance(facts, FolderFacts) else _checkpoint(facts))
    checkpoints = facts.checkpoints if isinstance(facts, FolderFacts) else (facts,)
    return not any(one.problems for one in checkpoints)


def describe_written(path: Path) -> str:
    """Return one line about a directory that was just written."""
    from megatron_ds.checkpoint.inspect import inspect_model

    model = inspect_model(path)
    return f"{path}: {_describe_model(model)}, {_describe_files(model.files)}"


def _folder(facts: FolderFacts) -> Iterator[Row]:
    yield ("checkpoints", facts.path)
    for one in facts.checkpoints:
        name = Path(one.path).name
        mark = " (latest)" if name == facts.latest else ""
        when = f", written {one.origin.written_at}" if one.origin is not None else ""
        total = f", {size(one.bytes)}" if one.bytes else ""
        yield ("", f"{name}  {_verdict(one)}{total}{when}{mark}")
        yield from (("", f"  {problem}") for problem in one.problems)
    if facts.latest not in {Path(one.path).name for one in facts.checkpoints}:
        problem = "is missing" if facts.latest is None else f"names {facts.latest}, which does not exist"
        yield ("latest", f"{problem}; a run resumes from the newest intact checkpoint")
    intact = [one for one in facts.checkpoints if not one.problems]
    if intact:
        yield ("", "")
        yield from _checkpoint(intact[0])


def _checkpoint(facts: CheckpointFacts) -> Iterator[Row]:
    yield ("path", facts.path)
    if facts.model is not None:
        yield ("model", _describe_model(facts.model))
        yield ("weights", _describe_files(facts.model.files))
        if facts.model.passed_through is not None:
            yield ("", _describe_passed_through(facts.model.passed_through))
        if facts.model.pooling is not None:
            yield ("vectors", facts.model.pooling)
    if facts.adapters is not None:
        yield ("adapters", _describe_adapters(facts.adapters))
        yield ("base", facts.adapters.base)
        yield ("weights", _describe_files((facts.adapters.file,)))
    if facts.progress is not None and facts.origin is not None:
        yield from _progress(facts.progress, facts.origin)
        if not facts.progress.trained:
            yield ("state", "none: nothing was trained")
    if facts.state_files:
        kinds = ", ".join(f"{kind} {count(number)}" for kind, number in facts.state.items())
        yield ("state", f"{kinds}; {_describe_files(facts.state_files)}")
    if facts.progress is not None and not facts.problems:
        yield ("intact", _verdict(facts).removeprefix("intact, ").removeprefix("intact "))
    for problem in facts.problems:
        yield ("DAMAGED", problem)


def _describe_adapters(adapters: AdapterFacts) -> str:
    kind = {"LORA": "LoRA"}.get(adapters.kind, adapters.kind)
    return f"{kind}, r {adapters.rank}, on {adapters.modules} modules, {count(adapters.num_params)} parameters"


def _progress(progress: Progress, origin: Origin) -> Iterator[Row]:
    skipped = progress.step - progress.applied
    yield ("step", f"{progress.step:,}{f', of which {skipped:,} were skipped' if skipped else ''}")
    data = progress.data
    if data.fingerprint:
        yield ("data", f"{data.samples:,} samples read of {data.description}")
        order = "shuffled" if data.shuffle else "in order"
        yield ("", f"seq_length {data.seq_length}, {order}, seed {data.seed}, {data.fingerprint[:12]}")
    yield ("written", f"{origin.written_at} by {origin.source}")
    if progress.trained:
        experts = f", ep {origin.expert}" if origin.expert is not None else ""
        sequence = ", sequence parallel" if origin.sequence else ""
        yield (
            "layout",
            f"{origin.world_size} = tp {origin.tensor} x pp {origin.pipeline} x dp {origin.data}{experts}{sequence}, "
            f"ZeRO-{origin.zero_stage}, {origin.precision}; can be resumed at any other",
        )


def _verdict(facts: CheckpointFacts) -> str:
    if facts.problems:
        return f"DAMAGED ({len(facts.problems)} file{'s' if len(facts.problems) > 1 else ''})"
    return "intact, all checksums match" if facts.checked else "intact by file lengths (--fast)"


def _describe_model(model: ModelFacts) -> str:
    types = ", ".join(sorted(model.dtypes))
    active = f", {count(model.num_active_params)} active" if model.num_active_params < model.num_params else ""
    return f"{model.model_type} ({model.architecture}), {count(model.num_params)} parameters{active}, {types}"


def _describe_passed_through(found: PassedThroughFacts) -> str:
    return f"{found.tensors:,} of these tensors, {size(found.bytes)}, {', '.join(sorted(found.dtypes))}, pass through"


def _describe_files(files: tuple[TensorFileFacts, ...]) -> str:
    tensors, total = sum(file.tensors for file in files), sum(file.bytes for file in files)
    number = f"{len(files)} file{'s' if len(files) != 1 else ''}"
    return f"{number}, {tensors:,} tensors, {size(total)}"
