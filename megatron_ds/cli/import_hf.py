"""`megatron-ds import`: a Hugging Face directory -> a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins

HELP = """Make a checkpoint of a Hugging Face directory, whatever its files look like.

It reads .bin and safetensors, sharded or not, without the base model's prefix, with old names; every tensor is
accounted for. A checkpoint has no layout: train from it, or go on from it, with any number of ranks.

Examples:

\b
  megatron-ds import path/to/hf_dir out/checkpoint
  megatron-ds train run.yaml model.path=out/checkpoint --nproc 2
"""


def import_hf(
    hf_dir: Annotated[Path, typer.Argument(help="config.json and weights.", metavar="HF_DIR")],
    checkpoint: Annotated[Path, typer.Argument(help="The directory to write.", metavar="CHECKPOINT")],
    imports: Imports = None,
) -> None:
    """Import; see HELP."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # copying is bound by memory; before torch is imported
    load_plugins(imports)
    from megatron_ds.checkpoint.convert import import_hf as convert
    from megatron_ds.cli.inspect import written

    convert(hf_dir, checkpoint)
    print(f"imported {written(checkpoint)}")
