"""Convert a Hugging Face directory to a checkpoint and back, from files to files.

It needs no process group, no accelerator and no model in memory: one parameter is read at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_ds import hub
from megatron_ds.checkpoint.directory import (
    MANIFEST,
    PROGRESS,
    STATE,
    checkpoints_in,
    resolve_checkpoint,
    step_of,
    write_manifest,
)
from megatron_ds.checkpoint.files import flush, record_file, write_bytes
from megatron_ds.checkpoint.masters import compare_with_master
from megatron_ds.checkpoint.progress import Origin, Progress, decode, encode, timestamp
from megatron_ds.checkpoint.reader import StateReader, first_damage
from megatron_ds.checkpoint.state_keys import EMA, MASTER
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.dtypes import EXPORT_DTYPES
from megatron_ds.errors import CheckpointError, ConfigError, ConversionError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.convert import conversion_target
from megatron_ds.hf.export import exporting
from megatron_ds.hf.export_target import ExportTarget
from megatron_ds.hf.family import Part
from megatron_ds.hf.peft.adapters import read_adapters
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
from megatron_ds.hf.peft.export import export_adapters, export_merged
from megatron_ds.hf.peft.new_head import read_base
from megatron_ds.hf.peft.reader import AdapterReader
from megatron_ds.hf.upcycle import UpcycledWeights, Upcycling
from megatron_ds.hf.weights import HFWeights
from megatron_ds.paths import expanded, expanded_text
from megatron_ds.untrusted import read_text
from megatron_ds.untrusted.limits import RUN_FILE


def import_hf(
    source: str | Path, target: str | Path, *, overwrite: bool = False, upcycling: Upcycling | None = None
) -> HFModel:
    """Convert a Hugging Face directory to a checkpoint of step 0.

    Args:
        source: the directory with config, weights and the model's other files.
        target: the checkpoint. An unchanged export there is replaced at the end; on failure it stays.
        overwrite: replace any other directory too, except the source, checkpoints and outputs of runs.
        upcycling: the mixture of experts that is made of a dense model; None = the model as it is.

    Returns:
        The imported model.

    Raises:
        ConversionError: the source cannot be read without changing its meaning; the target must not be replaced; no
            mixture of experts computes what the model computes.
        CheckpointError: the target is a checkpoint, or cannot be written.
    """
    source, target = _model_directory(source), expanded(target)
    _refuse_checkpoint(target)
    place = conversion_target(source, target, overwrite)

    def add_state(directory: Path) -> None:
        (directory / STATE).mkdir()
        mixture = f", as {upcycling.num_experts} experts" if upcycling is not None else ""
        origin = Origin(written_at=timestamp(), source=f"import of {hub.name_of(str(source))}{mixture}")
        write_bytes(directory / PROGRESS, encode(Progress(), origin).encode())
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        write_manifest(directory, {str(path.relative_to(directory)): record_file(path) for path in files})
        for path in (*directory.rglob("*"), directory):
            flush(path)

    dense = HFWeights(source, read_model(source))
    weights: HFWeights | UpcycledWeights = dense
    if upcycling is not None:
        weights = UpcycledWeights(dense, upcycling)
    dtypes = dense.dtypes if upcycling is None else {}
    with _writing(target), exporting(place, weights.model, None, "5GB", dense, dtypes) as export:
        for part, full in weights.parts():
            export.add(part.name, full, part.expert)
            del full  # its memory is released before the next is read
        export.finish(source, source, add_state)
        flush(target.resolve().parent)
    return weights.model


def export_hf(
    checkpoint: str | Path,
    target: str | Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    *,
    merge: bool = False,
    base: str | Path | None = None,
    ema: bool = False,
    overwrite: bool = False,
) -> HFModel:
    """Convert a checkpoint to a Hugging Face directory without training state.

    Weights that already have the requested dtype are copied. For others the fp32 masters are rounded once, if there are
    any: a float32 export of a bfloat16 run holds what was trained, not its widened rounding.

    Args:
        checkpoint: a checkpoint; or a folder of checkpoints or a run's output, of which the latest is taken; or a
            Hugging Face directory.
        target: the directory to write. An unchanged export there is replaced at the end; on failure it stays.
        dtype: of all weights, "float32", "bfloat16" or "float16"; None = each tensor has its own.
        max_shard_size: upper bound on the size of a file, such as "5GB".
        merge: for adapters, write the base model with the adapters merged instead of a directory that peft loads.
        base: for adapters, the directory of their base model; None = the one that their config names.
        ema: write the average of the weights in place of those that were trained.
        overwrite: replace any other directory too, except what is read, checkpoints and outputs of runs.

    Returns:
        The exported model, or the base model of the adapters.

    Raises:
        CheckpointError: a file of the checkpoint is missing or damaged, it has no average of the weights, or the target
            cannot be written.
        ConversionError: the weights do not fit into the dtype; the target must not be replaced.
    """
    source, target = resolve_checkpoint(_model_directory(checkpoint)), expanded(target)
    base = _model_directory(base, "--base=") if base is not None else None
    place = conversion_target(source, target, overwrite, _read_by_its_run(source))
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ConversionError(f"--dtype={dtype} is not one of {', '.join(EXPORT_DTYPES)}")
    reader = _open_intact(source) if (source / STATE).is_dir() else None
    if ema and (reader is None or not reader.has_average):
        raise CheckpointError(
            f"{source} has no average of the weights, which --ema would write; remove --ema, or train with "
            "train.ema.decay=0.999"
        )
    kind = EMA if ema else MASTER
    if (source / ADAPTER_CONFIG).is_file():
        return _export_adapters(source, place, reader, base, (dtype, max_shard_size), merge, kind)
    if merge or base is not None:
        raise ConversionError(f"{source} holds no adapters; remove {'--merge' if merge else '--base'}")
    weights = HFWeights(source, read_model(source))

    stored, table = weights.dtypes, weights.model.table

    def best(part: Part, full: Tensor) -> Tensor:
        if reader is not None and ema and reader.has(EMA, part.name):
            return reader.read_part(EMA, part, tuple(full.shape))
        if reader is None or dtype is None or not reader.has(MASTER, part.name):
            return full
        names = table[part.name].of(part.expert).names
        if all(stored[name] == EXPORT_DTYPES[dtype] for name in names):
            return full
        return _master(reader, part, full, weights.rounded)

    dtypes = stored if dtype is None else {}
    with _writing(target), exporting(place, weights.model, dtype, max_shard_size, weights, dtypes) as export:
        for part, full in weights.parts():
            export.add(part.name, best(part, full), part.expert)
            del full
        export.finish(source, source)
    return weights.model


def _model_directory(path: str | Path, prefix: str = "") -> Path:
    """Return the directory that a path, or an id of a model on the hub, names."""
    text = expanded_text(str(path))
    return Path(hub.local_directory(text, prefix + text))


def _export_adapters(
    source: Path,
    target: ExportTarget,
    reader: StateReader | None,
    base: str | Path | None,
    form: tuple[str | None, str],
    merge: bool,
    kind: str,
) -> HFModel:
    """Export adapters for peft, or merged. The fp32 masters, or averages, are rounded, if there are any."""
    given = str(named_base(source) or "")
    named = base or hub.local_directory(given, f"{source}: its base {given}")
    if not named or not Path(named).is_dir():
        raise ConversionError(f"{source}: its base {named} is no directory here; give it as --base DIR")
    target = replace(target, kept={**target.kept, f"{named}, the base of {source}": Path(named)})
    target.check()
    weights = HFWeights(named, read_base(source, named))
    stored = AdapterReader(source, read_adapters(source, weights.model, str(Path(named).resolve())))
    adapters, (dtype, max_shard_size) = stored.adapters, form

    def read(name: str) -> Tensor:
        full = stored.full(name)
        if kind == EMA and reader is not None and reader.has(EMA, name):
            average = reader.read_full(EMA, name, tuple(full.shape))
            return average if merge or dtype is not None else average.to(full.dtype)
        copied = not merge and (dtype is None or full.dtype == EXPORT_DTYPES[dtype])
        if copied or reader is None or not reader.has(MASTER, name):
            return full
        return _master(reader, Part(name), full, lambda _, master: master)

    parameters = {name: read(name) for name in adapters.table}
    with _writing(target.path):
        if merge:
            end_ids = reader.progress.end_ids if reader is not None else ()
            export_merged(target, weights, named, adapters, parameters, dtype, max_shard_size, source, end_ids)
        else:
            export_adapters(target, adapters, parameters.items(), dtype, source)
    return adapters.model


def _master(reader: StateReader, part: Part, weight: Tensor, rounded: Callable[[Part, Tensor], Tensor]) -> Tensor:
    """Return the fp32 master of a parameter, or of one expert of it; rounded it must be the weight."""
    master = reader.read_part(MASTER, part, tuple(weight.shape))
    compare_with_master(reader, part.name, weight, rounded(part, master))
    return master


def _read_by_its_run(checkpoint: Path) -> dict[str, Path]:
    """Return the directories that the run of a checkpoint reads a model from: text for a message -> path.

    The run's own config.yaml names them. It may be missing: a checkpoint can be moved.
    """
    folder = checkpoint.resolve().parent
    file = folder.with_name("config.yaml")
    try:
        run = parse_yaml(read_text(file, RUN_FILE, ConfigError), str(file)) if step_of(checkpoint) >= 0 else {}
    except ConfigError:
        return {}
    run = run if isinstance(run, dict) else {}
    model = run["model"] if isinstance(run.get("model"), dict) else {}
    read = {"model.path": model.get("path"), "model.tokenizer": model.get("tokenizer"), "peft": run.get("peft")}
    return {
        f"{field}={path}, which the run of {checkpoint} reads": Path(path)
        for field, path in read.items()
        if isinstance(path, str)
    }


def _refuse_checkpoint(target: Path) -> None:
    """Refuse to import over a checkpoint, even if nothing was trained: a run may read it."""
    state = target / STATE
    if not state.exists():
        return
    if (target / PROGRESS).is_file() and (step := decode(target / PROGRESS)[0].step):
        raise CheckpointError(
            f"{target} would be replaced, and is a checkpoint of step {step}; choose another directory"
        )
    found = {str(path.relative_to(target)) for path in state.iterdir()} if state.is_dir() else {STATE}
    foreign = sorted(found - {MANIFEST, PROGRESS})
    if foreign:
        raise CheckpointError(
            f"{target} would be replaced, and holds {foreign[0]}, which no import writes; choose another directory"
        )


def _open_intact(checkpoint: Path) -> StateReader:
    problem = first_damage(checkpoint)
    if problem is None:
        return StateReader(checkpoint)
    others = (path for path in checkpoints_in(checkpoint.parent) if path != checkpoint)
    intact = next((path for path in others if first_damage(path) is None), None)
    raise CheckpointError(f"{problem}; nearest: {intact}, which is intact" if intact else problem)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn an error of the file system into a `CheckpointError`."""
    try:
        yield
    except OSError as problem:
        place = next(place for place in target.resolve().parents if place.is_dir())
        free = shutil.disk_usage(place).free
        raise CheckpointError(
            f"{target} could not be written: {problem.strerror or problem} ({free / 1e9:.2f} GB are free there); make "
            "room, or choose another directory"
        ) from problem
