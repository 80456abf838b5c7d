"""Rewriting of Hugging Face directories through the tables, without a process group or a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_ds.hf.config import read_model
from megatron_ds.hf.export import exporting
from megatron_ds.hf.export_target import ExportTarget
from megatron_ds.hf.weights import HFWeights


def rewrite(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    *,
    overwrite: bool = False,
) -> None:
    """Read every native parameter of a directory, one at a time, and write them to a clean directory.

    At any time memory holds one native parameter, or one expert if these are stored one by one, and the tensors on disk
    that it is read from and that are written from it.

    Args:
        source: directory with config.json, weights and other files of the model.
        target: directory to write. An unchanged export there is replaced at the end; on failure it stays, and no other
            file is left.
        dtype: of all weights, "float32", "bfloat16" or "float16"; None = each tensor has its own.
        max_shard_size: such as "5GB".
        overwrite: replace any other directory too, except the source, checkpoints and outputs of runs.

    Raises:
        ConversionError: the source cannot be read without changing its meaning, or a value does not fit into the dtype;
            the target must not be replaced.
    """
    place = conversion_target(source, target, overwrite)
    weights = HFWeights(source, read_model(source))
    dtypes = weights.dtypes if dtype is None else {}
    with exporting(place, weights.model, dtype, max_shard_size, weights, dtypes) as export:
        for part, full in weights.parts():
            export.add(part.name, full, part.expert)
            del full  # free the mapped files before the next parameter is read
        export.finish(source, source)


def conversion_target(
    source: str | Path, target: str | Path, overwrite: bool, also_read: Mapping[str, Path] = MappingProxyType({})
) -> ExportTarget:
    """Return the directory that a conversion writes, checked; its source is never replaced.

    Args:
        source: the directory to read.
        target: the directory to write.
        overwrite: replace a directory that is not an unchanged export.
        also_read: text of an error -> another directory that is never replaced.

    Raises:
        ConversionError: see `ExportTarget.check`.
    """
    kept = {f"{source}, which is read": Path(source), **also_read}
    found = ExportTarget(Path(target), overwrite=overwrite, kept=kept)
    found.check()
    return found
