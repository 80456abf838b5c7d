"""`megatron-ds init`: write a first run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded, expanded_text

HELP = """Write a commented run file for a model, its data and a number of GPUs.

The format of the data follows from their first row, and the layout is the first one whose memory is planned to fit.
The file is checked as `train` checks it. Read it before you start it: learning rate and batch size are common values,
and not chosen for your data.

Examples:

\b
  megatron-ds init run.yaml --model hf_dir --data corpus.jsonl --gpus 8
  megatron-ds init lora.yaml --model hf_dir --data chat.jsonl --lora
  megatron-ds init small.yaml --model hf_dir --data corpus.txt --random
  megatron-ds init a.yaml --model hf_dir --data a.txt --gpu-memory 24GB
"""


def init(
    run: Annotated[Path, typer.Argument(help="The file to write.", metavar="RUN.yaml", parser=expanded)],
    model: Annotated[
        str, typer.Option(metavar="HF_DIR", parser=expanded_text, help="Hugging Face directory, id or checkpoint.")
    ],
    data: Annotated[
        str,
        typer.Option(metavar="PATH", parser=expanded_text, help="Training data: file, directory, pattern or prefix."),
    ],
    valid: Annotated[
        str | None,
        typer.Option(metavar="PATH", parser=expanded_text, help="Validation data (default: 1 % of the training data)."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="All GPUs of the run (default: those of this machine).")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each (default: that of this machine's, or 80GB).")
    ] = None,
    output: Annotated[
        str, typer.Option(metavar="DIR", parser=expanded_text, help="Where the run writes (default: out/NAME).")
    ] = "",
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA adapters instead of all weights.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Start from random weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace RUN.yaml.")] = False,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    load_plugins(imports)
    from megatron_ds.errors import ConfigError
    from megatron_ds.hf.weight_files import parse_size
    from megatron_ds.log import quiet_libraries

    if lora and random:
        raise ConfigError("--lora with --random would train adapters of random weights; leave one of them out")
    quiet_libraries()  # before DeepSpeed says that it finds no GPU

    from megatron_ds.engine import device_count, device_type
    from megatron_ds.new_run import NewRun, write_run

    own = device_count() if device_type() == "cuda" else 0
    num_gpus = gpus if gpus is not None else own
    size = parse_size(gpu_memory, "--gpu-memory") if gpu_memory is not None else _device_bytes(own)
    folder = output or f"out/{run.stem}"
    layout = write_run(NewRun(model, data, folder, valid, num_gpus, size, lora, random), run, overwrite=overwrite)
    where = f"{num_gpus} GPUs" if num_gpus > 1 else "1 GPU" if num_gpus else "one rank on the CPU"
    print(f"{run}: for {where}, tensor {layout.tensor}, ZeRO-{layout.stage}, recompute {layout.recompute}")
    print(f"look at the data   megatron-ds inspect {run}")
    print(f"start              {_start(run, num_gpus, own)}")


def _start(run: Path, num_gpus: int, own: int) -> str:
    """Return the command that starts the run, with torchrun if it needs other machines."""
    if num_gpus <= max(own, 1):
        return f"megatron-ds train {run}" + (f" --nproc {num_gpus}" if num_gpus > 1 else "")
    if num_gpus <= 8:
        return f"megatron-ds train {run} --nproc {num_gpus}"
    return f"torchrun --nnodes {-(-num_gpus // 8)} --nproc-per-node 8 ... -m megatron_ds train {run}"


def _device_bytes(num_devices: int) -> int:
    """Return the memory of this machine's first GPU; 80 GB if it has none."""
    if not num_devices:
        return 80 * 10**9
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)
