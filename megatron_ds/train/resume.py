"""Go on where a run was cut: from which checkpoint, and whether this run is the one that it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.folder import lock, point_to, remove_leftovers, resolve_checkpoint, set_aside, step_of
from megatron_ds.checkpoint.progress import DataPosition, Progress
from megatron_ds.checkpoint.reader import Found, first_damage, newest_whole
from megatron_ds.config import RunConfig
from megatron_ds.config.wording import nearest_names, show
from megatron_ds.data import Dataset
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf.config import HFModel
from megatron_ds.parallel.rank import RankInfo


def folder_of(run: RunConfig) -> Path:
    """Where a run's checkpoints are."""
    return Path(run.output) / "checkpoints"


def find(run: RunConfig, info: RankInfo) -> Found:
    """What the run goes on from, none of its files damaged. Collective."""
    resume = run.checkpoint.resume
    if resume == "never":
        return Found()
    if resume == "auto":
        return newest_whole(folder_of(run), info.rank, info.world_size)
    path = resolve_checkpoint(resume)
    problem = first_damage(path, info.rank, info.world_size)
    return Found(path) if problem is None else Found(None, (problem,))


def check_found(run: RunConfig, found: Found) -> None:
    """Refuse to start anew where there are checkpoints.

    Raises:
        CheckpointError: none of them is whole.
    """
    if found.path is None and found.damaged:
        raise CheckpointError(
            f"checkpoint.resume={run.checkpoint.resume}: {found.damaged[0]}"
            + (f"; none of {len(found.damaged)} checkpoints is whole" if len(found.damaged) > 1 else "")
            + "; checkpoint.resume=never starts anew"
        )


@dataclass(frozen=True)
class Claim:
    """A folder of checkpoints that is this process's alone, as long as this object lives.

    Attributes:
        notes: what there is to say of how it was found.
        lock: of the folder; None where there is none.
    """

    notes: tuple[str, ...] = ()
    lock: object = None


def clear_way(run: RunConfig, found: Found) -> Claim:
    """Make room for the checkpoints to come, on one rank, losing nothing.

    What a crash left half-written goes. Checkpoints that this run does not go on from are moved aside.

    Raises:
        CheckpointError: the folder cannot be written, or another run does.
    """
    folder = folder_of(run)
    said = [f"passed over a damaged checkpoint: {problem}" for problem in found.damaged]
    held = None
    try:
        if run.checkpoint.every or folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder)
        remove_leftovers(folder)
        mine = found.path if found.path is not None and found.path.resolve().parent == folder.resolve() else None
        aside = set_aside(folder, after=step_of(mine) if mine is not None else -1)
        if folder.is_dir():
            point_to(folder, mine.name if mine is not None else None)
    except OSError as problem:
        raise CheckpointError(f"{folder} cannot be written ({problem.strerror or problem})") from problem
    if aside is not None:
        said.append(f"checkpoints that this run does not go on from are now in {aside}")
    return Claim(tuple(said), held)


def check_same_model(run: HFModel, saved: HFModel, checkpoint: Path) -> None:
    """Whether a checkpoint is of the run's model; rates of dropout may differ.

    Raises:
        CheckpointError: naming the first field that differs.
    """
    mine, theirs = ({"model_type": model.family.model_type, **_fields(asdict(model.core))} for model in (run, saved))
    for name in sorted({**mine, **theirs}, key=lambda name: isinstance(mine.get(name), list | tuple)):  # numbers first
        if mine.get(name) != theirs.get(name) and "dropout" not in name:
            raise CheckpointError(
                f"{checkpoint} is of another model: {name}={show(theirs.get(name))}, the run has "
                f"{show(mine.get(name))}; choose another output, or checkpoint.resume=never"
            )


def _fields(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {name: value for key, inner in node.items() for name, value in _fields(inner, f"{prefix}{key}.").items()}


def begin(run: RunConfig, saved: Progress | None, data: Dataset, where: Path | None) -> Progress:
    """Where a run begins, or goes on.

    Raises:
        CheckpointError: it would go on in other data, and `data.restart` does not say that it may.
    """
    here = DataPosition(
        fingerprint=data.fingerprint,
        seed=run.train.seed,
        seq_length=data.seq_length,
        shuffle=run.data.shuffle,
        description=data.describe(),
    )
    if saved is None:
        return Progress(data=here)
    then = saved.data
    changed = [
        (field, old, new)
        for field, old, new in (
            ("data.seq_length", then.seq_length, here.seq_length),
            ("train.seed", then.seed, here.seed),
            ("data.shuffle", then.shuffle, here.shuffle),
            ("data.train", then.description, here.description),
        )
        if old != new
    ]
    if then.samples == 0 or (not changed and then.fingerprint == here.fingerprint):
        return saved.with_data(**{**asdict(here), "samples": then.samples})
    if run.data.restart:
        return saved.with_data(**asdict(here))
    field, old, new = changed[0] if changed else ("data.train", "other samples", here.description)
    raise CheckpointError(
        f"{field}={show(new)} is not what {where} was trained on: {show(old)}; change it back, or set "
        "data.restart=true to go on with the new data from their beginning"
    )


def frozen_parameters(model: HFModel, patterns: Sequence[str]) -> frozenset[str]:
    """Our names of the parameters all of whose Hugging Face tensors match a pattern of `train.freeze`.

    Raises:
        ConfigError: a pattern matches nothing, or a part of a parameter.
    """
    names = [name for row in model.table.values() for name in row.names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = " or ".join(nearest_names(pattern, names) or names[:2])
            raise ConfigError(f"train.freeze={pattern} matches no tensor of the model, such as {near}")
    frozen = set()
    for native, row in model.table.items():
        matched = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in row.names]
        if any(matched) and not all(matched):
            apart = row.names[matched.index(False)]
            raise ConfigError(
                f"train.freeze: {row.names[matched.index(True)]} is one parameter with {apart} here; freeze both or "
                "none"
            )
        if all(matched):
            frozen.add(native)
    if len(frozen) == len(model.table):
        raise ConfigError("train.freeze matches every tensor of the model; leave some to train")
    return frozenset(frozen)
