"""`megatron-ds export`: write a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded

if TYPE_CHECKING:
    from megatron_ds.hf.config import HFModel

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
  megatron-ds export out/run out/hf --push-to org/name
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
    push_to: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="Upload it to ORG/NAME on the Hugging Face hub, made if need be, or to a URL."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everyone sees a repository that is made.")] = False,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported: copying is memory-bound
    load_plugins(imports)
    from megatron_ds.checkpoint.convert import export_hf
    from megatron_ds.cli.inspect import describe_written
    from megatron_ds.hub import describe_upload
    from megatron_ds.log import setup_logging
    from megatron_ds.remote import require_local

    setup_logging(rank=0)
    require_local(str(hf_dir), "HF_DIR", "--push-to uploads to a URL")
    send = _prepare_push(push_to, hf_dir, public) if push_to is not None else None
    model = export_hf(checkpoint, hf_dir, dtype, max_shard_size, merge=merge, base=base, ema=ema, overwrite=overwrite)
    if (hf_dir / "adapter_config.json").is_file():
        print(f"exported {hf_dir}: {model.family.model_type} adapters for peft")
    else:
        print(f"exported {describe_written(hf_dir)}")
    if send is not None:
        print(describe_upload(push_to or "", send(model)))


def _prepare_push(repository: str, hf_dir: Path, public: bool) -> Callable[[HFModel], str]:
    """Check that a repository can be written; returns the function that uploads the directory."""
    from megatron_ds.errors import ConfigError
    from megatron_ds.hf.export_mark import MARK
    from megatron_ds.hf.model_card import model_card
    from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
    from megatron_ds.hub import parse_id, prepare_push, push
    from megatron_ds.remote import as_url, prepare_upload_to, upload_model

    named = f"--push-to={repository}"
    if (url := as_url(repository)) is not None:
        prepare_upload_to(url, named)
        return lambda model: upload_model(hf_dir, url, named, {MARK})
    target = parse_id(repository)
    if target is None:
        raise ConfigError(f"{named} is no repository on the hub, nor a URL; write org/name or s3://bucket/name")
    prepare_push(target, named, private=not public)

    def send(model: HFModel) -> str:
        is_adapter = (hf_dir / ADAPTER_CONFIG).is_file()
        base = parse_id(str(named_base(hf_dir))) if is_adapter else None
        card = model_card(target.repo.partition("/")[2], model, base, {}, is_adapter=is_adapter)
        return push(hf_dir, target, named, card, {MARK})

    return send
