"""Describe a directory from its files alone: a checkpoint, a folder of checkpoints, or a Hugging Face model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

from megatron_ds import hub
from megatron_ds.checkpoint.directory import (
    LATEST,
    PROGRESS,
    STATE,
    checkpoints_in,
    newest_name,
    read_manifest,
    step_of,
)
from megatron_ds.checkpoint.files import FileRecord, damage
from megatron_ds.checkpoint.masters import check_masters
from megatron_ds.checkpoint.progress import Origin, Progress, decode
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.errors import CheckpointError, ConversionError
from megatron_ds.hf.config import read_json, read_model
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_weights
from megatron_ds.hf.sentence_modules import describe
from megatron_ds.hf.tensor_files import read_table
from megatron_ds.hf.weights import HFWeights
from megatron_ds.paths import expanded_text


@dataclass(frozen=True)
class TensorFileFacts:
    """A file of tensors and how many it holds."""

    name: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class PassedThroughFacts:
    """Tensors that are not trained and pass through: their number and size, and dtype -> number of tensors."""

    tensors: int
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class ModelFacts:
    """A model on disk.

    Attributes:
        model_type, architecture: as transformers names them.
        num_params: the number of parameters, tied ones counted once.
        num_active_params: the number of these that one token uses; fewer if there are experts.
        dtypes: dtype as safetensors names it -> number of tensors, without those that pass through.
        files: the files of weights.
        passed_through: the tensors that pass through; None = all are the model's own.
        pooling: a line on the vector of each text; None = the model has a head, or its directory no modules.json.
    """

    model_type: str
    architecture: str
    num_params: int
    num_active_params: int
    dtypes: dict[str, int]
    files: tuple[TensorFileFacts, ...]
    passed_through: PassedThroughFacts | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """Adapters on disk, in peft's format.

    Attributes:
        kind: such as LORA.
        rank: r.
        modules: the number of the base model's modules that have one.
        num_params: the number of parameters of all of them.
        base: the path of the base model, as their config names it.
        file: the file of weights.
    """

    kind: str
    rank: int
    modules: int
    num_params: int
    base: str
    file: TensorFileFacts


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint, or a plain model: then without progress, origin and state. Damaged parts are left out.

    Attributes:
        path: its directory.
        model: its model; None if it holds adapters.
        adapters: its adapters, if it holds any.
        progress, origin: see `progress`.
        state: kind -> number of elements.
        state_files: the files of the training state.
        bytes: of all files that it must have.
        problems: a line for each file that is missing or damaged.
        checked: whether checksums were compared.
    """

    path: str
    model: ModelFacts | None
    progress: Progress | None = None
    origin: Origin | None = None
    state: dict[str, int] = field(default_factory=dict)
    state_files: tuple[TensorFileFacts, ...] = ()
    bytes: int = 0
    problems: tuple[str, ...] = ()
    checked: bool = False
    adapters: AdapterFacts | None = None


@dataclass(frozen=True)
class FolderFacts:
    """Checkpoints of a run, newest first; `latest` is the content of the folder's `latest` file."""

    path: str
    latest: str | None
    checkpoints: tuple[CheckpointFacts, ...]


def inspect(path: str | Path, *, fast: bool = False) -> CheckpointFacts | FolderFacts:
    """Describe a directory.

    Args:
        path: a checkpoint, a folder of checkpoints, a run's output, or a Hugging Face directory.
        fast: compare the lengths of files only; else every byte is read and the checksums are compared.

    Raises:
        CheckpointError: the directory is something else.
    """
    path = Path(hub.local_directory(expanded_text(str(path))))
    for folder in (path, path / "checkpoints"):
        if checkpoints_in(folder):
            latest = folder / LATEST
            name = (newest_name(folder) or "no checkpoint") if latest.is_file() else None
            return FolderFacts(str(folder), name, tuple(_checkpoint(one, fast) for one in checkpoints_in(folder)))
    if (path / STATE).is_dir():
        return _checkpoint(path, fast)
    if (path / ADAPTER_CONFIG).is_file():
        found = inspect_adapters(path)
        return CheckpointFacts(hub.name_of(str(path)), None, bytes=found.file.bytes, adapters=found)
    if (path / "config.json").is_file():  # an export may have any name
        model = inspect_model(path)
        return CheckpointFacts(hub.name_of(str(path)), model, bytes=sum(file.bytes for file in model.files))
    if path.is_dir() and step_of(path) >= 0:
        return _checkpoint(path, fast)
    what = "is no checkpoint, folder of checkpoints, run output or Hugging Face directory"
    if not path.exists():
        what = f"does not exist (looked in {Path.cwd()})"
    raise CheckpointError(f"{path} {what}; data are a run file, the PREFIX of indexed files, or a .jsonl or .txt file")


def inspect_model(path: Path) -> ModelFacts:
    """Describe the model in a directory, ignoring other files; headers are read, no weights.

    Raises:
        CheckpointError: there is no model of a supported family.
    """
    try:
        weights = HFWeights(path, read_model(path))
        tables = {file: read_table(file) for file in weights.files}
    except ConversionError as problem:
        raise CheckpointError(str(problem)) from problem
    model, passed = weights.model, frozenset(weights.model.passed_through)
    dtypes = Counter(one.dtype for table in tables.values() for name, one in table.items() if name not in passed)
    files = tuple(TensorFileFacts(file.name, hub.size_of(file), len(table)) for file, table in tables.items())
    num_params = weights.num_params
    active = num_params - model.core.num_expert_params_idle
    others = _passed_through(weights) if passed else None
    return ModelFacts(
        model.family.model_type, model.architecture, num_params, active, dict(dtypes), files, others, _pooling(weights)
    )


def _pooling(weights: HFWeights) -> str | None:
    """Return a line on the vector of each text that a directory gives, or the reason why it is not computed here."""
    try:
        pooling = weights.with_pooling().model.core.pooling
    except ConversionError as problem:
        return f"not supported: {problem}"
    return describe(pooling) if pooling is not None else None


def _passed_through(weights: HFWeights) -> PassedThroughFacts:
    names, source = weights.model.passed_through, weights.source
    return PassedThroughFacts(len(names), sum(map(source.nbytes, names)), dict(Counter(map(source.dtype, names))))


def inspect_adapters(path: Path) -> AdapterFacts:
    """Describe the adapters in a directory; their base model is not read.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        file = find_weights(path) or path / ADAPTER_WEIGHTS
        config, table = read_json(path / ADAPTER_CONFIG), read_table(file)
        kind, rank = str(config.get("peft_type")), int(config.get("r") or 0)
    except (ConversionError, TypeError, ValueError) as problem:
        raise CheckpointError(str(problem)) from problem
    modules = {module for name in table if (module := re.split(r"\.(?:lora_|ia3_l)", name)[0]) != name}
    num_params = sum(prod(stored.shape) for stored in table.values())
    base = str(config.get("base_model_name_or_path"))
    return AdapterFacts(kind, rank, len(modules), num_params, base, _file(file))


def _checkpoint(path: Path, fast: bool) -> CheckpointFacts:
    """Describe the readable parts of a checkpoint, with a line for each damaged file."""
    try:
        records = read_manifest(path)
    except CheckpointError as problem:
        return CheckpointFacts(str(path), None, problems=(str(problem),))
    found = {name: _damage(path / name, record, fast) for name, record in records.items()}
    damaged = [name for name, what in found.items() if what is not None]
    problems = [f"{path / name} {found[name]}" for name in damaged]
    facts = CheckpointFacts(str(path), None, bytes=sum(record.bytes for record in records.values()), checked=not fast)
    parts = (
        (_with_model, any(not name.startswith(STATE) for name in damaged)),
        (_with_progress, PROGRESS in damaged),
        (_with_state, any(name.startswith(STATE) for name in damaged)),
        (partial(_with_masters, sampled=fast), bool(damaged)),
    )
    for add, is_damaged in parts:
        if not is_damaged:
            try:
                facts = add(facts, path)
            except CheckpointError as problem:  # damage that lengths do not show, or a newer version
                problems.append(str(problem))
    return replace(facts, problems=tuple(dict.fromkeys(problems)))


def _damage(file: Path, record: FileRecord, fast: bool) -> str | None:
    if fast and file.is_file() and file.stat().st_size == record.bytes:
        return None
    return damage(file, record)


def _with_model(facts: CheckpointFacts, path: Path) -> CheckpointFacts:
    if (path / ADAPTER_CONFIG).is_file():
        return replace(facts, adapters=inspect_adapters(path))
    return replace(facts, model=inspect_model(path))


def _with_progress(facts: CheckpointFacts, path: Path) -> CheckpointFacts:
    progress, origin = decode(path / PROGRESS)
    return replace(facts, progress=progress, origin=origin)


def _with_state(facts: CheckpointFacts, path: Path) -> CheckpointFacts:
    state = StateReader(path).elements_by_kind()
    files = tuple(_file(file) for file in sorted((path / STATE).glob("*.safetensors")))
    return replace(facts, state=state, state_files=files)


def _with_masters(facts: CheckpointFacts, path: Path, *, sampled: bool) -> CheckpointFacts:
    try:
        check_masters(StateReader(path), sampled=sampled)
    except ConversionError as problem:
        raise CheckpointError(str(problem)) from problem
    return facts


def _file(path: Path) -> TensorFileFacts:
    return TensorFileFacts(path.name, path.stat().st_size, len(read_table(path)))


def as_json(facts: CheckpointFacts | FolderFacts) -> dict[str, object]:
    """Return the facts as JSON values."""
    return asdict(facts)
