"""`megatron-ds export`: a checkpoint -> a clean Hugging Face directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

HELP = """Write the model of a checkpoint as a Hugging Face directory that transformers loads.

CHECKPOINT may be a folder of checkpoints or a run's output: then it is the latest. Without
--dtype weights are copied; with another type than theirs the fp32 masters are rounded once.

Examples:

\b
  megatron-ds export out/run out/hf
  megatron-ds export out/run/checkpoints/step_00000200 out/hf --dtype float32
"""


def export(
    checkpoint: Annotated[Path, typer.Argument(help="What is exported.", metavar="CHECKPOINT")],
    hf_dir: Annotated[Path, typer.Argument(help="The directory to write.", metavar="HF_DIR")],
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16 (default: as they are).")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
) -> None:
    """Export; see HELP."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # copying is bound by memory; before torch is imported
    from megatron_ds.checkpoint.convert import export_hf
    from megatron_ds.cli.inspect import written

    export_hf(checkpoint, hf_dir, dtype, max_shard_size)
    print(f"exported {written(hf_dir)}")
