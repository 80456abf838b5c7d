"""Go on where a run was cut: from which checkpoint, and whether this run is the one that it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ds.checkpoint.directory import lock, point_to, remove_leftovers, resolve_checkpoint, set_aside, step_of
from megatron_ds.checkpoint.progress import DataPosition, Progress
from megatron_ds.checkpoint.reader import ResumePoint, first_damage, newest_intact
from megatron_ds.config import RunConfig
from megatron_ds.data import Dataset
from megatron_ds.errors import CheckpointError, show
from megatron_ds.hf.config import HFModel
from megatron_ds.parallel.rank_info import RankInfo


def checkpoint_folder(output: str) -> Path:
    """Where a run's checkpoints are."""
    return Path(output) / "checkpoints"


def find_resume_point(run: RunConfig, info: RankInfo) -> ResumePoint:
    """What the run goes on from, none of its files damaged. Collective."""
    resume = run.checkpoint.resume
    if resume == "never":
        return ResumePoint()
    if resume == "auto":
        return newest_intact(checkpoint_folder(run.output).resolve(), info.rank, info.world_size)
    path = resolve_checkpoint(resume).resolve()
    problem = first_damage(path, info.rank, info.world_size)
    return ResumePoint(path) if problem is None else ResumePoint(None, (problem,))


def check_resume_point(run: RunConfig, found: ResumePoint) -> None:
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


def lock_output(run: RunConfig) -> object:
    """Have an output that is there for this process alone, as long as what is returned lives; on one rank.

    What a crash left half-written goes.

    Raises:
        CheckpointError: another run has it, or it cannot be written.
    """
    output = Path(run.output)
    if not output.is_dir():
        return None
    with _told(output):
        held = lock(output)
        remove_leftovers(checkpoint_folder(run.output))
    return held


def prepare_output(run: RunConfig, found: ResumePoint, held: object) -> tuple[object, tuple[str, ...]]:
    """Make room for what the run is going to write, losing nothing, when nothing can refuse it any more; on one rank.

    Checkpoints that this run does not go on from are moved aside, `latest` names the one that it does.

    Args:
        run: the run.
        found: what it goes on from.
        held: from `claim`.

    Returns:
        what keeps the output for this process, and what there is to say.

    Raises:
        CheckpointError: the output cannot be written, another run has it, or the run would move what it reads.
    """
    output, folder = Path(run.output), checkpoint_folder(run.output)
    said = [f"passed over a damaged checkpoint: {problem}" for problem in found.damaged]
    with _told(folder):
        output.mkdir(parents=True, exist_ok=True)
        held = held if held is not None else lock(output)
        if run.checkpoint.every:
            folder.mkdir(exist_ok=True)
        mine = found.path if found.path is not None and found.path.parent == folder.resolve() else None
        after = step_of(mine) if mine is not None else -1
        adapters = run.peft if isinstance(run.peft, str) else None
        read = (("model.path", run.model.path), ("model.tokenizer", run.model.tokenizer), ("peft", adapters))
        for field, path in read:
            used = resolve_checkpoint(path).resolve() if path is not None else None
            if used is not None and used.parent == folder.resolve() and step_of(used) > after:
                raise CheckpointError(
                    f"{field}={path} is among the checkpoints under output={run.output} that would be moved aside; "
                    "choose another output"
                )
        aside = set_aside(folder, after)
        if folder.is_dir():
            point_to(folder, mine.name if mine is not None else None)
    if aside is not None:
        said.append(f"checkpoints that this run does not go on from are now in {aside}")
    return held, tuple(said)


@contextmanager
def _told(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise CheckpointError(f"{place} cannot be written ({problem.strerror or problem})") from problem


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


def initial_progress(run: RunConfig, saved: Progress | None, data: Dataset, where: Path | None) -> Progress:
    """Where a run begins, or goes on.

    Raises:
        CheckpointError: it would go on in other data, and `data.restart` does not say that it may; or it has more steps
            than the run.
    """
    here = DataPosition(
        fingerprint=data.fingerprint,
        seed=run.train.seed,
        seq_length=data.seq_length,
        shuffle=run.data.shuffle,
        description=data.describe(),
        settings=_settings(run),
    )
    if saved is None:
        return Progress(data=here)
    if saved.step > run.train.steps:
        raise CheckpointError(
            f"train.steps={run.train.steps} is less than the {saved.step} steps that {where} has; nearest: {saved.step}"
        )
    then = saved.data
    changed = None if then.samples == 0 else _first_change(then, here, data.ordered)
    if changed is None:
        return saved.with_data(**{**asdict(here), "samples": then.samples})
    if run.data.restart:
        return saved.with_data(**asdict(here))
    raise CheckpointError(
        f"{changed.now} is not what {where} was trained on: {changed.then}; change it back, or set data.restart=true "
        "to go on with the new data from their beginning"
    )


class _Change(NamedTuple):
    """In words."""

    now: str
    then: str


_SIZE = ("train.steps", "train.global_batch_size")


def _settings(run: RunConfig) -> dict[str, Any]:
    """What decides which samples there are, beside the content of the data; the likeliest to be changed last."""
    data = run.data
    weights = [source.weight for source in data.train]
    plain = ("split", "loss_turns", "overlong", "packing", "mask_rate", "whole_words", "mean_span", "target_length")
    return {
        "data.format": data.format,
        "data.train": [source.path for source in data.train],
        "data.train[*].weight": None if None in weights else weights,
        **{f"data.{name}": getattr(data, name) for name in plain},
        "data.options": data.options,
        "model.tokenizer": run.model.tokenizer_path,
        "train.steps": run.train.steps,
        "train.global_batch_size": run.train.global_batch_size,
    }


def _first_change(then: DataPosition, here: DataPosition, is_ordered: bool) -> _Change | None:
    """The first thing that makes the samples others, or puts them in another order; None = they are the same."""
    for field, old, new in (
        ("data.seq_length", then.seq_length, here.seq_length),
        ("train.seed", then.seed, here.seed),
        ("data.shuffle", then.shuffle, here.shuffle),
    ):
        if old != new:
            return _Change(f"{field}={show(new)}", show(old))
    if then.fingerprint == here.fingerprint:
        return None
    changed = [field for field, new in here.settings.items() if field in then.settings and then.settings[field] != new]
    for field in changed:
        if field == "data.train":
            return _first_other_source(then.settings[field], here.settings[field])
        if field not in _SIZE:
            return _Change(f"{field}={show(here.settings[field])}", show(then.settings[field]))
    if is_ordered and changed:
        sizes = " x ".join(f"{field}={here.settings[field]}" for field in _SIZE)
        before = " x ".join(str(then.settings[field]) for field in _SIZE)
        return _Change(
            f"the order of {here.description}, which goes by the epochs that {sizes} take,",
            f"{then.description}, with {before}",
        )
    same = then.description == here.description
    return _Change(f"data.train ({here.description})", "other content of the same size" if same else then.description)


def _first_other_source(then: Sequence[str], here: Sequence[str]) -> _Change:
    pairs = enumerate(zip_longest(then, here, fillvalue="nothing"))
    place, (old, new) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    field = "data.train" if len(then) == len(here) == 1 else f"data.train[{place}]"
    return _Change(f"{field}={new}", old)
