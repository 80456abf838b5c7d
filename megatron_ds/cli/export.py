"""`megatron-ds export`: write a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded

HELP = """Write the model of a checkpoint as a Hugging Face directory that transformers loads.

CHECKPOINT may be a folder of checkpoints or a run's output; then the latest is exported. Without
--dtype the weights are copied; with another dtype the fp32 master weights are rounded once. A
checkpoint of adapters becomes a directory for peft, or with --merge a full model. An earlier export
in HF_DIR is replaced if it was not changed since, and anything else with --overwrite; the source, its
base model, checkpoints and outputs of runs never.

Examples:

\b
  megatron-ds export out/run out/hf
  megatron-ds export out/run/checkpoints/step_00000200 out/hf --dtype float32
  megatron-ds export out/lora out/hf --merge
  megatron-ds export out/run out/averaged --ema
"""


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="The checkpoint to export.", metavar="CHECKPOINT", parser=expanded)
    ],
    hf_dir: Annotated[Path, typer.Argument(help="The directory to write.", metavar="HF_DIR", parser=expanded)],
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16 (default: unchanged).")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA adapters into the base weights.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Write the average of the weights that train.ema keeps.")] = False,
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=expanded, help="Base model of adapters (default: from their config)."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a directory that is not an unchanged export.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported: copying is memory-bound
    load_plugins(imports)
    from megatron_ds.checkpoint.convert import export_hf
    from megatron_ds.cli.inspect import describe_written
    from megatron_ds.log import setup_logging

    setup_logging(rank=0)
    model = export_hf(checkpoint, hf_dir, dtype, max_shard_size, merge=merge, base=base, ema=ema, overwrite=overwrite)
    if (hf_dir / "adapter_config.json").is_file():
        print(f"exported {hf_dir}: {model.family.model_type} adapters for peft")
    else:
        print(f"exported {describe_written(hf_dir)}")
