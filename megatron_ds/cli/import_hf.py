"""`megatron-ds import`: convert a Hugging Face directory to a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded

HELP = """Convert a Hugging Face directory to a checkpoint.

It reads .bin and safetensors files, sharded or not, with or without the base model's prefix, with older tensor names
and those of wrappers (_orig_mod., module.); every tensor is checked. A checkpoint is independent of the layout: train
or resume from it with any number of ranks. A checkpoint is never replaced, another directory with files only with
--overwrite.

Examples:

\b
  megatron-ds import path/to/hf_dir out/checkpoint
  megatron-ds train run.yaml model.path=out/checkpoint --nproc 2
"""


def import_hf(
    hf_dir: Annotated[Path, typer.Argument(help="config.json and weights.", metavar="HF_DIR", parser=expanded)],
    checkpoint: Annotated[Path, typer.Argument(help="The directory to write.", metavar="CHECKPOINT", parser=expanded)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a directory that is not an unchanged export.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported: copying is memory-bound
    load_plugins(imports)
    from megatron_ds.checkpoint.convert import import_hf as convert
    from megatron_ds.cli.inspect import describe_written

    convert(hf_dir, checkpoint, overwrite=overwrite)
    print(f"imported {describe_written(checkpoint)}")
