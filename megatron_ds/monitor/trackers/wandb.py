"""Weights & Biases."""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_ds.errors import ConfigError
from megatron_ds.log import get_logger
from megatron_ds.monitor.sinks import SINKS, SinkInfo
from megatron_ds.monitor.trackers.ids import known_id
from megatron_ds.monitor.trackers.tracker import CLOSE_S, Tracker
from megatron_ds.monitor.trackers.values import Line, name_of_run, nested_settings


@SINKS.register("wandb")
class Wandb(Tracker):
    """Logger of a wandb run. wandb reads its own environment variables too, such as `WANDB_MODE` and `WANDB_API_KEY`.

    Args:
        info: the run.
        project: name of the project; None = `WANDB_PROJECT`, or wandb's default.
        entity: user or team; None = `WANDB_ENTITY`, or the user's default.
        run_name: None = the name of the output directory.
        group, job_type, tags, notes: as in `wandb.init`.
        mode: `online`, `offline` or `disabled`; None = `WANDB_MODE`, or online.
    """

    package: ClassVar[str | None] = "wandb"
    extra: ClassVar[str] = "wandb"
    secret: ClassVar[str] = "WANDB_API_KEY"

    def __init__(
        self,
        info: SinkInfo,
        *,
        project: str | None = None,
        entity: str | None = None,
        run_name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        import wandb

        if (mode or wandb.setup().settings.mode) == "online" and not wandb.login(prompt=False):
            raise ConfigError(f"{info.entry}: no API key is configured; try wandb login, or its option mode: offline")
        before = known_id(info)
        self._run = wandb.init(
            project=project,
            entity=entity,
            name=name_of_run(info, run_name),
            group=group,
            job_type=job_type,
            tags=tags,
            notes=notes,
            mode=mode,
            dir=str(info.output),
            config=nested_settings(info),
            id=before,
            resume="allow" if before is not None else None,
            settings=wandb.Settings(silent=True, console="off", finish_timeout=CLOSE_S),
        )
        place = str(self._run.dir) if self._run.offline else self._run.url
        get_logger().info("%s: run %s, %s", info.entry, self._run.id, place)
        super().__init__(info, self._run.id)

    def log(self, line: Line) -> None:
        """Log a row."""
        self._run.log(dict(line.values), step=line.step)

    def finish(self) -> None:
        """Upload what is left, and mark the run as finished or failed."""
        self._run.finish(exit_code=int(self.failed))
