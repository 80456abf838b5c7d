"""`megatron-ds evaluate`: the loss of a model on data, or its scores on tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded, expanded_text

if TYPE_CHECKING:
    from megatron_ds.evaluation import DataResult, Evaluation

HELP = """Compute the loss, the perplexity and the metrics of a model on data. Nothing is trained or changed.

PATH is a run file or the output of a run, of which the latest checkpoint is evaluated, on its validation data unless
--data names others; or a checkpoint, or a Hugging Face directory.

Examples:

\b
  megatron-ds evaluate out/run
  megatron-ds evaluate run.yaml --data a.txt --data b.txt --json found.json
  megatron-ds evaluate path/to/hf_dir --data a.txt data.seq_length=2048
  megatron-ds evaluate path/to/hf_dir --data a.txt --tp 2 --pp 2 --nproc 8
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
    from megatron_ds.evaluation import evaluate as start

    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise ConfigError(f"--json={json} is not a file in a directory that exists")
    found = start(
        path,
        [expanded_text(one, f"--data={one}") for one in data or []],
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


def _numbers(one: DataResult) -> Iterator[tuple[str, float]]:
    yield "loss", one.loss
    if one.perplexity is not None:
        yield "perplexity", one.perplexity
    if one.bits_per_byte is not None:
        yield "bits per byte", one.bits_per_byte
    for name, value in (*one.terms.items(), *one.metrics.items()):
        yield name.replace("_", " "), value
