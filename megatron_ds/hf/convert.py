"""A Hugging Face directory through our tables and back: files in, files out, no process group, no model in memory."""

from __future__ import annotations

from pathlib import Path

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.export import exporting, foreign_files
from megatron_ds.hf.weights import HFWeights


def rewrite(source: str | Path, target: str | Path, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """Read every native parameter out of a directory, one at a time, and write a clean directory of them.

    Holds one native parameter, the tensors on disk that it is made of, and those that are made of it.

    Args:
        source: config.json, weights, and what else belongs to the model.
        target: a model that is there is replaced at the end; on failure it stays, and nothing else is left.
        dtype: of all weights, "float32", "bfloat16" or "float16"; None = as they are.
        max_shard_size: such as "5GB".

    Raises:
        ConversionError: the source cannot be read without changing its meaning, or does not fit into the dtype; the
            target is the source, or holds something else than a model.
    """
    check_target(Path(source), Path(target))
    weights = HFWeights(source, read_model(source))
    with exporting(target, weights.model, dtype, max_shard_size) as export:
        for name, whole in weights.each():
            export.add(name, whole)
            del whole  # what it was read from leaves memory before the next is read
        export.finish(source, source)


def check_target(source: Path, target: Path, allowed: tuple[str, ...] = ()) -> None:
    """Whether a directory may be written, and one that is there be replaced.

    Args:
        source: what is read.
        target: what is to be written.
        allowed: names beside a model's that it may hold.

    Raises:
        ConversionError: it is the source or around it, no directory, or holds something else.
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
