"""`megatron-ds export`: a checkpoint -> a clean Hugging Face directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins

HELP = """Write the model of a checkpoint as a Hugging Face directory that transformers loads.

CHECKPOINT may be a folder of checkpoints or a run's output: then it is the latest. Without
--dtype weights are copied; with another type than theirs the fp32 masters are rounded once.
Of adapters a directory that peft loads is written, or with --merge a whole model.

Examples:

\b
  megatron-ds export out/run out/hf
  megatron-ds export out/run/checkpoints/step_00000200 out/hf --dtype float32
  megatron-ds export out/lora out/hf --merge
"""


def export(
    checkpoint: Annotated[Path, typer.Argument(help="What is exported.", metavar="CHECKPOINT")],
    hf_dir: Annotated[Path, typer.Argument(help="The directory to write.", metavar="HF_DIR")],
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16 (default: as they are).")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    merge: Annotated[bool, typer.Option("--merge", help="Of adapters: put them into their base's weights.")] = False,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of adapters: their base (default: as their config says).")
    ] = None,
    imports: Imports = None,
) -> None:
    """Export; see HELP."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # copying is bound by memory; before torch is imported
    load_plugins(imports)
    from megatron_ds.checkpoint.convert import export_hf
    from megatron_ds.cli.inspect import written

    model = export_hf(checkpoint, hf_dir, dtype, max_shard_size, merge=merge, base=base)
    if (hf_dir / "adapter_config.json").is_file():
        print(f"exported {hf_dir}: adapters of a {model.family.model_type}, for peft")
    else:
        print(f"exported {written(hf_dir)}")
