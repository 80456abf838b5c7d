"""What a directory holds, from its files alone: a checkpoint, a folder of checkpoints, or a Hugging Face model."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_ds.checkpoint.files import damage
from megatron_ds.checkpoint.folder import (
    LATEST,
    PROGRESS,
    STATE,
    checkpoints_in,
    is_checkpoint,
    read_manifest,
    step_of,
)
from megatron_ds.checkpoint.progress import Origin, Progress, decode
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.errors import CheckpointError, ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.files import read_table
from megatron_ds.hf.weights import HFWeights


@dataclass(frozen=True)
class FileFacts:
    """A file of tensors."""

    name: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class ModelFacts:
    """A model on disk.

    Attributes:
        model_type, architecture: transformers' words.
        num_params: tied ones once.
        dtypes: type in safetensors' words -> number of tensors.
        files: of weights.
    """

    model_type: str
    architecture: str
    num_params: int
    dtypes: dict[str, int]
    files: tuple[FileFacts, ...]


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint, or a plain model: then without progress, origin and state.

    Attributes:
        path: where.
        model: its weights.
        progress, origin: see `progress`.
        state: kind -> number of elements.
        state_files: of the training state.
        bytes: of all files that it must have.
        problems: a line for each file that is missing or damaged.
        checked: whether checksums were looked at.
    """

    path: str
    model: ModelFacts | None
    progress: Progress | None = None
    origin: Origin | None = None
    state: dict[str, int] = field(default_factory=dict)
    state_files: tuple[FileFacts, ...] = ()
    bytes: int = 0
    problems: tuple[str, ...] = ()
    checked: bool = False


@dataclass(frozen=True)
class FolderFacts:
    """Checkpoints of a run, newest first; `latest` is what the folder says it is."""

    path: str
    latest: str | None
    checkpoints: tuple[CheckpointFacts, ...]


def inspect(path: str | Path, *, fast: bool = False) -> CheckpointFacts | FolderFacts:
    """Look at a directory.

    Args:
        path: a checkpoint, a folder of checkpoints, a run's output, or a Hugging Face directory.
        fast: believe files that have the right length; else every byte is read and compared with its checksum.

    Raises:
        CheckpointError: it is none of these.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if checkpoints_in(folder):
            latest = folder / LATEST
            name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
            return FolderFacts(str(folder), name, tuple(_checkpoint(one, fast) for one in checkpoints_in(folder)))
    if (path / STATE).is_dir() or is_checkpoint(path) or step_of(path) >= 0:
        return _checkpoint(path, fast)
    if (path / "config.json").is_file():
        model = _model(path)
        return CheckpointFacts(str(path), model, bytes=sum(file.bytes for file in model.files))
    if path.with_suffix(".idx").is_file() or path.suffix in (".bin", ".idx"):
        raise CheckpointError(f"{path} is indexed data, which this version cannot look into yet")
    raise CheckpointError(f"{path} is no checkpoint, folder of checkpoints, run output or Hugging Face directory")


def _checkpoint(path: Path, fast: bool) -> CheckpointFacts:
    """Everything that can still be read, and what cannot."""
    try:
        records = read_manifest(path)
    except CheckpointError as problem:
        return CheckpointFacts(str(path), None, problems=(str(problem),))
    problems = []
    for name, record in records.items():
        file = path / name
        if fast and file.is_file() and file.stat().st_size == record.bytes:
            continue
        found = damage(file, record)
        if found is not None:
            problems.append(f"{file} {found}")
    facts = CheckpointFacts(
        str(path),
        None,
        bytes=sum(record.bytes for record in records.values()),
        problems=tuple(problems),
        checked=not fast,
    )
    if problems:
        return facts
    progress, origin = decode(path / PROGRESS)
    return replace(
        facts,
        model=_model(path),
        progress=progress,
        origin=origin,
        state=StateReader(path).elements_by_kind(),
        state_files=tuple(_file(file) for file in sorted((path / STATE).glob("*.safetensors"))),
    )


def _model(path: Path) -> ModelFacts:
    try:
        weights = HFWeights(path, read_model(path))
    except ConversionError as problem:
        raise CheckpointError(str(problem)) from problem
    tables = {file: read_table(file) for file in weights.files}
    dtypes = Counter(stored.dtype for table in tables.values() for stored in table.values())
    model = weights.model
    files = tuple(FileFacts(file.name, file.stat().st_size, len(table)) for file, table in tables.items())
    return ModelFacts(model.family.model_type, model.architecture, weights.num_params, dict(dtypes), files)


def _file(path: Path) -> FileFacts:
    return FileFacts(path.name, path.stat().st_size, len(read_table(path)))


def as_json(facts: CheckpointFacts | FolderFacts) -> dict[str, object]:
    """For machines."""
    return asdict(facts)
