"""Directories of the models that a run reads: its paths, snapshots of models on the hub, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_ds.checkpoint.directory import checkpoints_in, is_checkpoint
from megatron_ds.config import RunConfig
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.errors import ConfigError, HubError, RemoteError
from megatron_ds.hub import HubId, hub_id, name_of, parse_id, pinned
from megatron_ds.log import log_once
from megatron_ds.remote import is_url
from megatron_ds.runtime.loaded_model import name_directory
from megatron_ds.training.resume import RUN_FILE, checkpoint_folder, named_checkpoint
from megatron_ds.untrusted import read_text
from megatron_ds.untrusted.limits import RUN_FILE as RUN_LIMITS


def with_pinned_models(run: RunConfig) -> RunConfig:
    """Return the run with the commits of the models on the hub that it reads, so that all ranks read the same.

    A run that is resumed reads those with which it began, where the run file names no revision. An id whose commit
    cannot be found out stays; reading it says why.
    """
    before = _ids_before(run)

    def pin(field: str, path: str) -> str:
        place, former = hub_id(path), before.get(field)
        if place is not None and place.revision is None and former is not None and former.repo == place.repo:
            return str(former)
        try:
            return pinned(path, f"{field}={path}")
        except HubError:
            return path

    return _with_models(run, pin)


def _ids_before(run: RunConfig) -> dict[str, HubId]:
    """Return the ids with commits of the run whose checkpoints are in the output and are resumed, by key."""
    file = Path(run.output) / RUN_FILE
    if run.checkpoint.resume != "auto" or not checkpoints_in(checkpoint_folder(run.output)):
        return {}
    try:
        content = parse_yaml(read_text(file, RUN_LIMITS, ConfigError), str(file))
    except ConfigError:
        return {}  # it is gone, or refused later on
    content = content if isinstance(content, dict) else {}
    model = content["model"] if isinstance(content.get("model"), dict) else {}
    given = {"model.path": model.get("path"), "model.tokenizer": model.get("tokenizer"), "peft": content.get("peft")}
    found = {key: parse_id(text) for key, text in given.items() if isinstance(text, str)}
    return {key: one for key, one in found.items() if one is not None and one.revision is not None}


def with_directories(run: RunConfig, checkpoint: Path | None) -> RunConfig:
    """Return the run with the directories that its paths and ids of models name; see `name_directory`.

    A resumed run reads everything from its checkpoint if `model.path` is gone, or is on a hub or a store that cannot be
    read. Adapters need it, their base.

    Args:
        run: the run file.
        checkpoint: the checkpoint that it resumes; None = it starts, or has not been looked for.

    Raises:
        HubError, RemoteError: a model cannot be read, and there is no such checkpoint.
    """
    problem: HubError | RemoteError | None = None
    try:
        run = _with_models(run, name_directory)
    except (HubError, RemoteError) as error:
        problem = error
    path = run.model.path
    if problem is None and (path is None or Path(path).exists()):
        return run
    found = None if run.peft is not None or path is None else checkpoint or _resumed_checkpoint(run)
    if found is None:
        if problem is not None:
            raise problem
        return run
    reason = f"model.path={path} is gone" if problem is None else str(problem)
    log_once(f"{reason}; the model's config and other files are read from {found}")
    tokenizer = run.model.tokenizer
    if tokenizer is not None and (hub_id(tokenizer) is not None or is_url(tokenizer)):
        tokenizer = None  # the checkpoint has it
    return run.model_copy(update={"model": run.model.model_copy(update={"path": str(found), "tokenizer": tokenizer})})


def with_hub_names(run: RunConfig) -> RunConfig:
    """Return the run with ids, commits included, for directories in the cache of the hub's client."""
    return _with_models(run, lambda field, path: name_of(path))


def _with_models(run: RunConfig, change: Callable[[str, str], str]) -> RunConfig:
    """Return the run with other paths of models.

    Args:
        change: (key of the run file, path) -> path.
    """
    given = {"path": run.model.path, "tokenizer": run.model.tokenizer}
    changed = {name: change(f"model.{name}", path) for name, path in given.items() if path is not None}
    peft = change("peft", run.peft) if isinstance(run.peft, str) else run.peft
    return run.model_copy(update={"model": run.model.model_copy(update=changed), "peft": peft})


def _resumed_checkpoint(run: RunConfig) -> Path | None:
    """Return the checkpoint that a run is going to resume if it is intact; None = it starts."""
    if run.checkpoint.resume == "never":
        return None
    auto = run.checkpoint.resume == "auto"
    found = checkpoints_in(checkpoint_folder(run.output)) if auto else [named_checkpoint(run.checkpoint.resume)]
    return next((path for path in found if is_checkpoint(path)), None)
