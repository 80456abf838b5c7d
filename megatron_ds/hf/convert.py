"""Rewriting of Hugging Face directories through the tables, without a process group or a model in memory."""

from __future__ import annotations

from pathlib import Path

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.export import exporting, foreign_files
from megatron_ds.hf.weights import HFWeights


def rewrite(source: str | Path, target: str | Path, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """Read every native parameter of a directory, one at a time, and write them to a clean directory.

    At any time memory holds one native parameter, the tensors on disk that it is read from, and those written from it.

    Args:
        source: directory with config.json, weights and other files of the model.
        target: directory to write. A model there is replaced at the end; on failure it stays, and no other file is
            left.
        dtype: of all weights, "float32", "bfloat16" or "float16"; None = unchanged.
        max_shard_size: such as "5GB".

    Raises:
        ConversionError: the source cannot be read without changing its meaning, or a value does not fit into the dtype;
            the target is the source, or holds other files than a model's.
    """
    check_target(Path(source), Path(target))
    weights = HFWeights(source, read_model(source))
    with exporting(target, weights.model, dtype, max_shard_size) as export:
        for name, full in weights.each():
            export.add(name, full)
            del full  # free the mapped files before the next parameter is read
        export.finish(source, source)


def check_target(source: Path, target: Path, allowed: tuple[str, ...] = ()) -> None:
    """Refuse a target directory that must not be written or replaced.

    Args:
        source: the directory to read.
        target: the directory to write.
        allowed: names that the target may hold in addition to a model's files.

    Raises:
        ConversionError: the target is the source or a parent of it, not a directory, or holds other files.
    """
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents:
        raise ConversionError(f"{target} would replace {source}, which is read; choose another directory")
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file; choose another place for the directory")
    foreign = [name for name in foreign_files(target) if name not in allowed] if target.is_dir() else []
    if foreign:
        raise ConversionError(
            f"{target} would be replaced, and holds {foreign[0]}, which is no file of a model; choose another directory"
        )
