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

With --experts a mixture of experts is made of a dense model: each expert is a copy of its MLP, routers are random, and
at first it computes what the dense model computes (llama, mistral, qwen2, qwen3 and granite).

Examples:

\b
  megatron-ds import path/to/hf_dir out/checkpoint
  megatron-ds train run.yaml model.path=out/checkpoint --nproc 2
  megatron-ds import path/to/hf_dir out/mixture --experts 8 --top-k 2
"""


def import_hf(
    hf_dir: Annotated[
        Path, typer.Argument(help="config.json and weights; or an id on the hub.", metavar="HF_DIR", parser=expanded)
    ],
    checkpoint: Annotated[Path, typer.Argument(help="The directory to write.", metavar="CHECKPOINT", parser=expanded)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a directory that is not an unchanged export.")
    ] = False,
    experts: Annotated[
        int | None, typer.Option(metavar="N", help="Make a mixture of N experts of a dense model.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Experts that each token uses (default: 2).")] = None,
    moe_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only every N-th layer gets experts, of Qwen models (default: 1)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the routers (default: 1234).")] = None,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    for option, value in (("--top-k", top_k), ("--moe-every", moe_every), ("--seed", seed)):
        if value is not None and experts is None:
            raise typer.BadParameter(f"{option} is for mixtures of experts; add --experts N, or remove it")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported: copying is memory-bound
    load_plugins(imports)
    from megatron_ds.checkpoint.convert import import_hf as convert
    from megatron_ds.cli.inspect import describe_written
    from megatron_ds.hf.upcycle import Upcycling
    from megatron_ds.log import setup_logging

    setup_logging(rank=0)
    given = {"top_k": top_k, "every": moe_every, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    upcycling = Upcycling(experts, **options) if experts is not None else None
    convert(hf_dir, checkpoint, overwrite=overwrite, upcycling=upcycling)
    print(f"imported {describe_written(checkpoint)}")
