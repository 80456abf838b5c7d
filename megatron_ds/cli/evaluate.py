"""`megatron-ds evaluate`: the loss of a model on data, or its scores on tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_ds.cli.json_file import check_json_file
from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded, expanded_text

if TYPE_CHECKING:
    from megatron_ds.evaluation import DataResult, Evaluation

HELP = """Compute the loss of a model on data, or its scores on tasks of lm-eval. Nothing is trained or changed.

PATH is a run file or the output of a run, of which the latest checkpoint is evaluated, on its validation data unless
--data names others; or a checkpoint, or a Hugging Face directory. Tasks need the package lm-eval.

Examples:

\b
  megatron-ds evaluate out/run
  megatron-ds evaluate run.yaml --data a.txt --data b.txt --json found.json
  megatron-ds evaluate path/to/hf_dir --data a.txt data.seq_length=2048
  megatron-ds evaluate path/to/hf_dir --data a.txt --tp 2 --pp 2 --nproc 8
  megatron-ds evaluate path/to/hf_dir --tasks lambada_openai,arc_easy --tp 2
  torchrun --nproc-per-node 8 -m megatron_ds evaluate out/run --tp 8
"""


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run file, a run's output, a checkpoint or a directory.", metavar="PATH", parser=expanded
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values of the run file's keys.", metavar="key.sub=value")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SOURCE", help="A file, directory, hub id or prefix; may be repeated."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Tasks, groups or tags of lm-eval, instead of data.")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=expanded, help="Folder with YAML files of further tasks.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Examples before each question (default: the task's).")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="N", help="Questions of each task, or a share of them below 1.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Write questions by the tokenizer's chat template.")
    ] = False,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Write every question and answer to the file of --json.")
    ] = False,
    tp: Annotated[
        int | None, typer.Option("--tp", metavar="N", help="Tensor ranks (default: the run's, or 1).")
    ] = None,
    pp: Annotated[int | None, typer.Option("--pp", metavar="N", help="Pipeline ranks (default: the same).")] = None,
    nproc: Annotated[
        int | None, typer.Option(metavar="N", help="Local ranks (default: as few as the layout needs).")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16: of the weights in memory.")
    ] = "auto",
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Rows of a forward pass on one rank.")
    ] = 8,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", parser=expanded, help="Write all numbers to this file.")
    ] = None,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    load_plugins(imports)
    from megatron_ds.errors import ConfigError
    from megatron_ds.evaluation import Tasks
    from megatron_ds.evaluation import evaluate as start

    check_json_file(json)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    for option, value in (("--tasks-dir", tasks_dir), ("--num-fewshot", num_fewshot), ("--limit", limit)):
        if value is not None and not names:
            raise ConfigError(f"{option}={value} does nothing without --tasks; try --tasks NAME")
    found = start(
        path,
        [expanded_text(one, f"--data={one}") for one in data or []],
        tasks=Tasks(names, tasks_dir, num_fewshot, limit, chat_template, log_samples) if names else None,
        overrides=overrides or [],
        tp=tp,
        pp=pp,
        nproc=nproc,
        dtype=dtype,
        batch_size=batch_size,
        note=_note,
    )
    if found is None:  # a launcher's rank other than the first
        return
    if json is not None:
        found.save(json)
    for line in lines(found):
        print(line)


def _note(text: str) -> None:
    print(text, flush=True)


def lines(found: Evaluation) -> Iterator[str]:
    """Yield the result as lines of text."""
    axes = {"tp": found.tp, "cp": found.cp, "pp": found.pp, "dp": found.dp}
    ranks = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1 or name == "tp")
    yield f"{'model':<12}{found.model_type}, {found.precision}, {ranks}: {found.weights}"
    for one in found.data:
        yield f"{'data':<12}{one.name}: {one.tokens:,} tokens in {one.samples:,} samples"
        yield f"{'':<12}{', '.join(f'{name} {value:.4f}' for name, value in _numbers(one))}"
    if found.tasks is not None:
        yield from _task_lines(found.tasks)


def _task_lines(tasks: Mapping[str, Any]) -> Iterator[str]:
    """Yield the metrics of each task or group, with their standard errors where lm-eval computes them."""
    for name, found in tasks["results"].items():
        shots = tasks["n-shot"].get(name)
        yield f"{'task':<12}{found.get('alias', name).strip()}" + (f", {shots}-shot" if shots is not None else "")
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
                continue
            error = found.get(f"{metric}_stderr,{kind}")
            spread = f" +- {error:.4f}" if isinstance(error, float) else ""
            yield f"{'':<12}{metric.replace('_', ' ')}{'' if kind == 'none' else f' ({kind})'} {value:.4f}{spread}"


def _numbers(one: DataResult) -> Iterator[tuple[str, float]]:
    yield "loss", one.loss
    if one.perplexity is not None:
        yield "perplexity", one.perplexity
    if one.bits_per_byte is not None:
        yield "bits per byte", one.bits_per_byte
    for name, value in (*one.terms.items(), *one.metrics.items()):
        yield name.replace("_", " "), value
