"""Where a run stands: all that a checkpoint has beside tensors. Nothing in it depends on the layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ds.errors import CheckpointError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class DataPosition:
    """How far a run has come in its data, and which data these are.

    Attributes:
        samples: taken so far, since `Progress.data_began`: where the next batch begins in the stream of samples.
        fingerprint: of the training data's samples, which their length is part of.
        seed: of their order.
        seq_length: of a sample.
        shuffle: whether they are in an order of their own each epoch.
        description: for people.
        settings: what the run file said of the data: to tell what has changed, should the fingerprint; empty in
            checkpoints of earlier versions.
    """

    samples: int = 0
    fingerprint: str = ""
    seed: int = 0
    seq_length: int = 0
    shuffle: bool = True
    description: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
        step: steps done, skipped ones too; also what dropout's random numbers go by.
        applied: optimizer steps that were not skipped: what the learning rate goes by.
        bad_steps: how many of the last steps in a row were skipped for a loss or gradient that was not finite.
        data: position in the data.
        loss_scale: state of fp16's loss scale; empty without one.
        trained: names of the parameters that have an optimizer state, in order.
    """

    step: int = 0
    applied: int = 0
    bad_steps: int = 0
    data: DataPosition = DataPosition()
    loss_scale: Mapping[str, float] = field(default_factory=dict)
    trained: tuple[str, ...] = ()

    def with_data(self, **changes: Any) -> Progress:
        return replace(self, data=replace(self.data, **changes))


@dataclass(frozen=True)
class Origin:
    """By whom a checkpoint was written; for people, nothing goes by it."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    zero_stage: int = 0
    precision: str = "fp32"
    written_at: str = ""
    source: str = ""


def timestamp() -> str:
    """Now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def encode(progress: Progress, origin: Origin) -> str:
    """As JSON."""
    content = {"format_version": FORMAT_VERSION, "progress": asdict(progress), "origin": asdict(origin)}
    return json.dumps(content, indent=2) + "\n"


def decode(path: Path) -> tuple[Progress, Origin]:
    """Read what `encode` gave.

    Raises:
        CheckpointError: it is not, or of a version to come.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version={version} is newer than this version's {FORMAT_VERSION}; upgrade megatron-ds"
            )
        fields = dict(content["progress"])
        data = DataPosition(**fields.pop("data"))
        trained = tuple(fields.pop("trained"))
        return Progress(**fields, data=data, trained=trained), Origin(**content["origin"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{path}: is not the state of a checkpoint ({problem})") from problem
