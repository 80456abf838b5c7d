"""`megatron-ds train`: pretrain or fine-tune a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.paths import expanded

HELP = """Pretrain or fine-tune a model as described by a run file.

Examples:

\b
  megatron-ds train run.yaml --nproc 2
  megatron-ds train run.yaml train.steps=10 parallel.tensor=2 --nproc 4
  megatron-ds train run.yaml train.deterministic=true checkpoint.every=100
  megatron-ds train run.yaml --nproc 4 --max-restarts 3 --min-nproc 2
  torchrun --nproc-per-node 8 -m megatron_ds train run.yaml
  deepspeed --module megatron_ds train run.yaml
  srun --kill-on-bad-exit=1 python -m megatron_ds train run.yaml
"""


def train(
    run: Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="RUN.yaml", parser=expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values that override those of the run file.", metavar="key.sub=value")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Local ranks to start (default 1). Leave out under torchrun, deepspeed or srun.",
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Restart local ranks that die from the last checkpoint, at most N times."
        ),
    ] = 0,
    min_nproc: Annotated[
        int | None,
        typer.Option(metavar="M", help="With --max-restarts: continue with the ranks that are left, at least M."),
    ] = None,
) -> None:
    """Run the command; see HELP."""
    from megatron_ds.cli.display import TerminalReporter
    from megatron_ds.config import load_run
    from megatron_ds.training.launch import Restarts, share_cores
    from megatron_ds.training.launch import train as start

    share_cores(nproc)  # the modules that the run file imports may import torch
    start(load_run(run, overrides or []), nproc, TerminalReporter, Restarts(max_restarts, min_nproc))
