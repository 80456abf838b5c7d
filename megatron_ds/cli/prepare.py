"""`megatron-ds prepare`: tokenize text into Megatron's .bin and .idx files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.paths import expanded_text

if TYPE_CHECKING:
    from megatron_ds.data.prepare import State

HELP = """Tokenize text once, into PREFIX.bin and PREFIX.idx in Megatron's format, and a manifest.

INPUT is a file, a directory that is searched for files, a pattern such as 'parts/*.jsonl.gz', a
directory saved by datasets, or a hub id. A .txt file is one document; .jsonl, .json, .csv, .tsv,
.parquet and .arrow files hold one per row, in the field "text"; .gz, .zst, .bz2 and .xz files are
unpacked. An interrupted command continues when it is run again. Malformed rows are counted,
listed, and refused unless --skip-bad.

Examples:

\b
  megatron-ds prepare corpus.jsonl --tokenizer hf_dir --output data/corpus
  megatron-ds prepare parts/ --tokenizer hf_dir --output data/all --workers 16
  megatron-ds prepare 'web/*.gz' --column body --tokenizer hf --output web
  megatron-ds inspect data/corpus --tokenizer hf_dir
"""
MAX_BAD_SHOWN = 10
REPORT_EVERY_S = 10.0


def prepare(
    inputs: Annotated[
        list[str], typer.Argument(help="Text to read, in this order.", metavar="INPUT...", parser=expanded_text)
    ],
    tokenizer: Annotated[str, typer.Option(metavar="DIR", parser=expanded_text, help="A directory with a tokenizer.")],
    output: Annotated[
        str, typer.Option(metavar="PREFIX", parser=expanded_text, help="Files to write: PREFIX.bin, .idx and .json.")
    ],
    workers: Annotated[
        int,
        typer.Option(metavar="N", min=0, show_default=False, help="Number of processes (default: number of cores)."),
    ] = 0,
    column: Annotated[str, typer.Option(metavar="NAME", help="The field that holds the text.")] = "text",
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The configuration of data sets on the hub.")] = None,
    split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="The split of data sets, such as train[:10%].")
    ] = None,
    no_eod: Annotated[bool, typer.Option("--no-eod", help="Do not append an end-of-text token to documents.")] = False,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin documents with the tokenizer's first special tokens (default: if it does so itself).",
        ),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip malformed lines.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing data of the same prefix.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard partial output of an earlier run.")] = False,
) -> None:
    """Run the command; see HELP."""
    from megatron_ds.data.indexed.files import index_path, tokens_path
    from megatron_ds.data.prepare import PrepareOptions
    from megatron_ds.data.prepare import prepare as run
    from megatron_ds.data.prepare.run import usable_cores
    from megatron_ds.data.readers.source import Source
    from megatron_ds.remote import require_local

    require_local(output, "--output", "upload the files with the tool of your store")
    options = PrepareOptions(
        [Source(path, name, split) for path in inputs],
        tokenizer,
        output,
        workers or usable_cores(),
        column,
        not no_eod,
        skip_bad,
        overwrite,
        restart,
        bos="auto" if bos is None else bos,
    )
    started_s, last = time.monotonic(), _LastState()
    try:
        with _progress() as show:

            def keep_and_show(state: State, total: int) -> None:
                last.keep(state)
                show(state, total)

            result = run(options, partial(print, flush=True), keep_and_show)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        raise
    finally:
        last.print_bad_lines()
    manifest, elapsed_s = result.manifest, time.monotonic() - started_s
    if result.unchanged:
        print(f"{output}: nothing to do, it was made from the same sources")
        return
    size = sum(path.stat().st_size for path in (tokens_path(output), index_path(output)))
    rate = last.tokens_since_start / max(elapsed_s, 1e-9)
    facts = (
        f"{manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens ({manifest['dtype'][1:]})",
        f"{size / 1e6:,.1f} MB; longest document {manifest['longest_document']:,} tokens",
        f"{rate:,.0f} tokens/s with {options.workers} workers",
    )
    print(f"{output}: {', '.join(facts[:2])}; {facts[2]}")


class _LastState:
    """The last state that was reported, and the number of tokens of this process run alone."""

    def __init__(self) -> None:
        self._state: State | None = None
        self._first: int | None = None

    def keep(self, state: State) -> None:
        self._state = state
        if self._first is None:
            self._first = state.tokens

    @property
    def tokens_since_start(self) -> int:
        return self._state.tokens - (self._first or 0) if self._state is not None else 0

    def print_bad_lines(self) -> None:
        """Print the positions of the first malformed lines to stderr."""
        bad = self._state.bad if self._state is not None else []
        for place in bad[:MAX_BAD_SHOWN]:
            print(place, file=sys.stderr)
        if self._state is not None and self._state.num_bad > MAX_BAD_SHOWN:
            print(f"... and {self._state.num_bad - MAX_BAD_SHOWN:,} more", file=sys.stderr)


@contextmanager
def _progress() -> Iterator[Callable[[State, int], None]]:
    """Show progress: a bar on a terminal, a line every `REPORT_EVERY_S` seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("prepare"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task, began_s, first = bar.add_task("prepare", total=None, status=""), time.monotonic(), [-1]

        def show(state: State, total: int) -> None:
            first[0] = state.tokens if first[0] < 0 else first[0]
            rate = (state.tokens - first[0]) / max(time.monotonic() - began_s, 1e-9)
            status = f"{state.documents:,} documents, {rate:,.0f} tokens/s"
            bar.update(task, completed=state.bytes, total=total, status=status)

        yield show


def _lines() -> Callable[[State, int], None]:
    last = [time.monotonic()]

    def show(state: State, total: int) -> None:
        if time.monotonic() - last[0] >= REPORT_EVERY_S:
            last[0] = time.monotonic()
            fraction = state.bytes / max(1, total)
            print(f"{fraction:6.1%}  {state.documents:,} documents, {state.tokens:,} tokens", flush=True)

    return show
