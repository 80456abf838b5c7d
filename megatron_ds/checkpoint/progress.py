"""Progress of a run: everything in a checkpoint that is not a tensor. Nothing in it depends on the layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from megatron_ds.errors import CheckpointError
from megatron_ds.untrusted import read_record
from megatron_ds.untrusted.limits import CHECKPOINT_RECORD
from megatron_ds.untrusted.records import Record

FORMAT_VERSION = 1
_WITHOUT_OTHER_FIELDS = ConfigDict(extra="forbid", strict=True)


_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class DataPosition:
    """The position of a run in its data, and the identity of these data.

    Attributes:
        samples: the number of samples read so far: the index of the next batch in the stream of samples.
        fingerprint: of the training data's samples, including their length.
        seed: of their order.
        seq_length: the length of a sample in tokens.
        shuffle: whether each epoch has its own order.
        description: a readable description of the data.
        phases: (first sample, weights of the sources) of each phase of a blend whose weights change; empty if they do
            not.
        settings: the data section of the run file, to name what has changed if the fingerprint differs; empty in
            checkpoints of earlier versions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _WITHOUT_OTHER_FIELDS

    samples: _Count = 0
    fingerprint: str = ""
    seed: int = 0
    seq_length: int = 0
    shuffle: bool = True
    description: str = ""
    phases: tuple[tuple[int, tuple[float, ...]], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """The progress of a run after a step.

    Attributes:
        step: the number of steps done, skipped ones included; dropout's random numbers follow from it.
        applied: the number of optimizer steps that were not skipped; the learning rate follows from it.
        bad_steps: the number of consecutive last steps that were skipped for a loss or gradient that was not finite.
        data: the position in the data.
        loss_scale: the state of fp16's loss scale; empty without one.
        trained: names of the parameters that have an optimizer state, in order.
        lr: the learning rate of the last step that was not skipped; None = unknown.
        end_ids: the ids that the data taught as an end and exports add to the generation settings.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _WITHOUT_OTHER_FIELDS

    step: _Count = 0
    applied: _Count = 0
    bad_steps: _Count = 0
    data: DataPosition = DataPosition()
    loss_scale: Mapping[str, float] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    lr: float | None = None
    end_ids: tuple[int, ...] = ()

    def with_data(self, **changes: Any) -> Progress:
        """Return a copy with some fields of `data` replaced."""
        return replace(self, data=replace(self.data, **changes))


@dataclass(frozen=True)
class Origin:
    """The run that wrote a checkpoint: shown by `inspect`, never read by a run.

    `expert` is the number of ranks that divided the experts; None = the model has no experts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _WITHOUT_OTHER_FIELDS

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int | None = None
    sequence: bool = False
    zero_stage: int = 0
    precision: str = "fp32"
    written_at: str = ""
    source: str = ""


def timestamp() -> str:
    """Return the current time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def encode(progress: Progress, origin: Origin) -> str:
    """Encode progress and origin as JSON. What the origin lacks is left out: earlier versions do not know it."""
    known = {name: value for name, value in asdict(origin).items() if value is not None}
    content = {"format_version": FORMAT_VERSION, "progress": asdict(progress), "origin": known}
    return json.dumps(content, indent=2) + "\n"


def decode(path: Path) -> tuple[Progress, Origin]:
    """Read a file that `encode` made.

    Raises:
        CheckpointError: the file is damaged, or of a newer version.
    """
    try:
        version = read_record(path, _Version, CHECKPOINT_RECORD, CheckpointError).format_version
        content = read_record(path, _Content, CHECKPOINT_RECORD, CheckpointError) if version <= FORMAT_VERSION else None
    except CheckpointError as problem:
        reason = str(problem).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: is not the state of a checkpoint ({reason})") from problem
    if content is None:
        raise CheckpointError(
            f"{path}: format_version={version} is newer than this version's {FORMAT_VERSION}; upgrade megatron-ds"
        )
    return content.progress, content.origin


class _Version(Record):
    format_version: int


class _Content(_Version):
    progress: Progress
    origin: Origin
