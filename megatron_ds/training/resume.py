"""Resume a run: choose the checkpoint, prepare the output directory, and check that model and data are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ds.checkpoint.directory import lock, point_to, remove_leftovers, resolve_checkpoint, set_aside, step_of
from megatron_ds.checkpoint.local_disks import LocalDisk, bring_back, draw_token, make_local_disk, read_token
from megatron_ds.checkpoint.progress import DataPosition, Progress
from megatron_ds.checkpoint.reader import ResumePoint, first_damage, newest_intact
from megatron_ds.checkpoint.remote_copies import set_copies_aside
from megatron_ds.config import RunConfig
from megatron_ds.data import Dataset
from megatron_ds.data.blend import Blend
from megatron_ds.data.parts import begins_documents
from megatron_ds.errors import CheckpointError, show
from megatron_ds.hf.config import HFModel
from megatron_ds.hub import local_directory
from megatron_ds.log import get_logger
from megatron_ds.parallel.consensus import gather_objects, run_long_on_all_ranks, run_on_all_ranks
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.remote import address_of, as_url
from megatron_ds.training.checkpoint_copies import fetch_newer_checkpoint

RUN_FILE = "config.yaml"
"""The run file in a run's output, with everything that was chosen."""


def checkpoint_folder(output: str) -> Path:
    """Return the directory of a run's checkpoints."""
    return Path(output) / "checkpoints"


def find_resume_point(run: RunConfig, info: RankInfo) -> ResumePoint:
    """Return the intact checkpoint that a run resumes and the damaged ones it skips. Collective over the world."""
    resume = run.checkpoint.resume
    if resume == "never":
        return ResumePoint()
    if resume == "auto":
        folder = checkpoint_folder(run.output).resolve()
        fetch_newer_checkpoint(run, folder, info)
        return _with_local_ones(run, folder, newest_intact(folder, info.rank, info.world_size), info)
    path = run_long_on_all_ranks(lambda: named_checkpoint(resume))
    problem = first_damage(path, info.rank, info.world_size)
    return ResumePoint(path) if problem is None else ResumePoint(None, (problem,))


def _with_local_ones(run: RunConfig, folder: Path, found: ResumePoint, info: RankInfo) -> ResumePoint:
    """Return the newest checkpoint, also if it was only on the machines' own disks. Collective over the world."""
    if run.checkpoint.local is None:
        return found
    newest = step_of(found.path) if found.path is not None else -1
    path, notes = bring_back(run.checkpoint.local, folder, newest, info.rank)
    for note in notes if info.rank == 0 else ():
        get_logger().info("%s", note)
    return ResumePoint(path, found.damaged) if path is not None else found


def prepare_local_disk(run: RunConfig, found: ResumePoint, info: RankInfo) -> LocalDisk | None:
    """Prepare the disk of this machine for checkpoints; None if the run has none. Collective over the world.

    Raises:
        CheckpointError: it cannot be written, or the output cannot.
    """
    section, folder = run.checkpoint, checkpoint_folder(run.output)
    if section.local is None:
        return None
    place = section.local
    own = found.path is not None and found.path.parent == folder.resolve()

    def draw() -> tuple[str, str]:
        with write_errors(folder):
            former = read_token(folder) if own else None
            token = draw_token(folder)
            return former or token, token

    former, token = gather_objects(run_on_all_ranks(draw if info.rank == 0 else lambda: ("", "")))[0]
    disk = run_on_all_ranks(lambda: make_local_disk(place, former, section.local_copies))
    renamed, machines = disk.renamed(token), gather_objects(disk.machine)

    def clear() -> None:
        if machines.index(machines[info.rank]) == info.rank:
            with write_errors(disk.folder):
                remove_leftovers(disk.folder)
                set_aside(disk.folder, step_of(found.path) if own and found.path is not None else -1)
                if renamed != disk:
                    disk.folder.rename(renamed.folder)

    run_on_all_ranks(clear)
    return renamed


def named_checkpoint(resume: str) -> Path:
    """Return the checkpoint that `checkpoint.resume` names; of a URL a copy on this machine.

    Raises:
        RemoteError: a URL cannot be read.
    """
    return resolve_checkpoint(local_directory(resume, f"checkpoint.resume={resume}")).resolve()


def check_resume_point(run: RunConfig, found: ResumePoint) -> None:
    """Refuse to start from step 0 where there are checkpoints, but only damaged ones.

    Raises:
        CheckpointError: none of them is intact.
    """
    if found.path is None and found.damaged:
        raise CheckpointError(
            f"checkpoint.resume={run.checkpoint.resume}: {found.damaged[0]}"
            + (f"; none of {len(found.damaged)} checkpoints is intact" if len(found.damaged) > 1 else "")
            + "; checkpoint.resume=never starts from step 0"
        )


def lock_output(run: RunConfig) -> object:
    """Lock an existing output directory and remove partial files of a crash. Rank 0 only.

    Returns:
        the lock, which is released when the object is dropped; None if the directory does not exist.

    Raises:
        CheckpointError: another run holds the lock, or the directory cannot be written.
    """
    output = Path(run.output)
    if not output.is_dir():
        return None
    with write_errors(output):
        output_lock = lock(output)
        remove_leftovers(checkpoint_folder(run.output))
    return output_lock


def prepare_output(run: RunConfig, found: ResumePoint, output_lock: object) -> tuple[object, tuple[str, ...]]:
    """Prepare the output directory for a run that passed all checks. Rank 0 only.

    Checkpoints after the one that the run resumes are moved aside, and `latest` is set to it. Nothing is deleted.

    Args:
        run: the run file.
        found: the checkpoint that it resumes.
        output_lock: the lock from `lock_output`; None if the directory did not exist.

    Returns:
        the lock of the output directory, and lines for the log.

    Raises:
        CheckpointError: the output cannot be written, another run holds its lock, or a checkpoint that the run reads
            would be moved.
    """
    output, folder = Path(run.output), checkpoint_folder(run.output)
    notes = [f"skipped damaged checkpoint: {problem}" for problem in found.damaged]
    with write_errors(folder):
        output.mkdir(parents=True, exist_ok=True)
        output_lock = output_lock if output_lock is not None else lock(output)
        if run.checkpoint.every:
            folder.mkdir(exist_ok=True)
        own = found.path if found.path is not None and found.path.parent == folder.resolve() else None
        after = step_of(own) if own is not None else -1
        adapters = run.peft if isinstance(run.peft, str) else None
        read = (("model.path", run.model.path), ("model.tokenizer", run.model.tokenizer), ("peft", adapters))
        for field, path in read:
            used = resolve_checkpoint(path).resolve() if path is not None else None
            if used is not None and used.parent == folder.resolve() and step_of(used) > after:
                raise CheckpointError(
                    f"{field}={path} is one of the checkpoints under output={run.output} that would be moved aside; "
                    "choose another output"
                )
        aside = set_aside(folder, after)
        if folder.is_dir():
            point_to(folder, own.name if own is not None else None)
    if aside is not None:
        notes.append(f"moved checkpoints that this run does not continue to {aside}")
    if run.checkpoint.copy_to is not None:
        notes += set_copies_aside(run.checkpoint.copy_to, abandoned_copies(run, found.path))
    return output_lock, tuple(notes)


def abandoned_copies(run: RunConfig, resumed: Path | None) -> int:
    """Return the step after which copies at `checkpoint.copy_to` are of a run that is not continued; -1 = all are.

    Args:
        run: the run file.
        resumed: the checkpoint that it resumes: one of its own, the copy of one, or another run's.
    """
    if resumed is None:
        return -1
    place = as_url(address_of(str(resumed)))
    if place is not None:
        folder, _, name = place.rpartition("/")
        return step_of(Path(name)) if folder == (run.checkpoint.copy_to or "").rstrip("/") else -1
    return step_of(resumed) if resumed.parent == checkpoint_folder(run.output).resolve() else -1


@contextmanager
def write_errors(place: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names `place`."""
    try:
        yield
    except OSError as problem:
        raise CheckpointError(f"{place} cannot be written ({problem.strerror or problem})") from problem


def check_same_model(run: HFModel, saved: HFModel, checkpoint: Path) -> None:
    """Check that a checkpoint has the run's model; dropout rates may differ.

    Raises:
        CheckpointError: a field differs; the message names the first one.
    """
    current, other = (
        {"model_type": model.family.model_type, **_fields(asdict(model.core)), **_label_names(model)}
        for model in (run, saved)
    )
    for name in sorted(
        {**current, **other}, key=lambda name: isinstance(current.get(name), list | tuple)
    ):  # numbers first
        if current.get(name) != other.get(name) and "dropout" not in name:
            back = "change model.rope back, " if name.rpartition(".")[2] == "rotary" else ""
            raise CheckpointError(
                f"{checkpoint} has a different model: {name}={show(other.get(name))}, the run has "
                f"{show(current.get(name))}; {back}choose another output, or checkpoint.resume=never"
            )


def _label_names(model: HFModel) -> dict[str, list[str]]:
    return (
        {} if model.core.labels is None else {"id2label": [name for _, name in sorted(model.config.id2label.items())]}
    )


def _fields(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {name: value for key, inner in node.items() for name, value in _fields(inner, f"{prefix}{key}.").items()}


def initial_progress(run: RunConfig, saved: Progress | None, data: Dataset, where: Path | None) -> Progress:
    """Return the progress at which a run starts or resumes.

    Args:
        run: the run file.
        saved: progress of the checkpoint that the run resumes; None = the run starts.
        data: the training data.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the run would resume with other data and `data.restart` is not set, or the checkpoint has more
            steps than the run.
    """
    here = DataPosition(
        fingerprint=data.fingerprint,
        seed=run.train.seed,
        seq_length=data.seq_length,
        shuffle=run.data.shuffle,
        description=data.describe(),
        phases=_phases(data),
        settings=_settings(run),
    )
    if saved is None:
        return Progress(data=here)
    steps = run.train.num_steps
    if saved.step > steps:
        raise CheckpointError(
            f"train.steps={steps} is less than the {saved.step} steps that {where} has; nearest: {saved.step}"
        )
    then = saved.data
    changed = None if then.samples == 0 else _first_change(then, here, data)
    if changed is None:
        return saved.with_data(**{**asdict(here), "samples": then.samples})
    if run.data.restart:
        return saved.with_data(**asdict(here))
    raise CheckpointError(
        f"{changed.now} is not what {where} was trained on: {changed.then}; {changed.fix}, or set data.restart=true "
        "to resume with the new data from their first sample"
    )


def _phases(data: Dataset) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """Return the phases of a blend whose weights change."""
    phases = data.mixture.phases if isinstance(data, Blend) else ()
    return tuple((phase.first, phase.weights) for phase in phases) if len(phases) > 1 else ()


def _begun(
    phases: tuple[tuple[int, tuple[float, ...]], ...], num_samples: int
) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """Return the phases after the first of which a run has read samples; the fingerprint has the first one."""
    return tuple(phase for phase in phases[1:] if phase[0] < num_samples)


class _Change(NamedTuple):
    """A data setting that differs from the checkpoint's, as text: `now` in the run, `then` in the checkpoint."""

    now: str
    then: str
    fix: str = "change it back"


_SIZE = ("train.steps", "train.global_batch_size", "train.batch_ramp")


def _settings(run: RunConfig) -> dict[str, Any]:
    """Return the settings that determine the samples, apart from the data's content; the most changed ones last."""
    data = run.data
    weights = [_plain_weight(source.weight) for source in data.train]
    plain = ("columns", "bad_rows", "bos", "split", "valid_share", "loss_on", "loss_turns", "date")
    more = ("overlong", "packing", "mask_rate", "whole_words", "mean_span", "target_length")
    return {
        "data.format": data.format,
        "data.train": [source.label for source in data.train],
        "data.train[*].weight": None if None in weights else weights,
        **{f"data.{name}": getattr(data, name) for name in (*plain, *more)},
        "data.long_context": None if (mix := data.long_context) is None else {str(least): mix[least] for least in mix},
        "data.options": data.options,
        "model.tokenizer": run.model.tokenizer_path,
        "train.steps": run.train.num_steps,
        "train.global_batch_size": run.train.global_batch_size,
        "train.batch_ramp": None if (ramp := run.train.batch_ramp) is None else ramp.model_dump(),
    }


def _plain_weight(weight: float | dict[int | str, float] | None) -> float | dict[str, float] | None:
    """Return a weight as JSON has it, whose keys are text."""
    return {str(start): value for start, value in weight.items()} if isinstance(weight, dict) else weight


def _first_change(then: DataPosition, here: DataPosition, data: Dataset) -> _Change | None:
    """Return the first difference that changes the samples or their order; None if the samples are the same."""
    for field, old, new in (
        ("data.seq_length", then.seq_length, here.seq_length),
        ("train.seed", then.seed, here.seed),
        ("data.shuffle", then.shuffle, here.shuffle),
    ):
        if old != new:
            return _Change(f"{field}={show(new)}", show(old))
    begun = [_begun(position.phases, then.samples) for position in (then, here)]
    if then.fingerprint == here.fingerprint and begun[0] == begun[1]:
        return None
    changed = [field for field, new in here.settings.items() if field in then.settings and then.settings[field] != new]
    for field in changed:
        if field == "data.train":
            return _first_other_source(then.settings[field], here.settings[field])
        if field not in _SIZE:
            return _Change(f"{field}={show(here.settings[field])}", show(then.settings[field]))
    if "data.bos" not in then.settings and begins_documents(data):
        return _Change(
            f"data.bos={show(here.settings['data.bos'])} ({here.description})",
            f"{then.description}, without a special token before each document",
            "set data.bos=false to resume as before",
        )
    if data.ordered and changed:
        known = [field for field in _SIZE if here.settings[field] or then.settings.get(field)]
        sizes = " x ".join(f"{field}={here.settings[field]}" for field in known)
        before = " x ".join(str(then.settings.get(field)) for field in known)
        return _Change(
            f"the order of {here.description}, which depends on the number of epochs in {sizes},",
            f"{then.description}, with {before}",
        )
    same = then.description == here.description
    return _Change(f"data.train ({here.description})", "other content of the same size" if same else then.description)


def _first_other_source(then: Sequence[str], here: Sequence[str]) -> _Change:
    pairs = enumerate(zip_longest(then, here, fillvalue="nothing"))
    place, (old, new) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    field = "data.train" if len(then) == len(here) == 1 else f"data.train[{place}]"
    return _Change(f"{field}={new}", old)
