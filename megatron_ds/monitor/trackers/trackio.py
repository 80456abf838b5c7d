"""Trackio: a local database, a Hugging Face Space or a server of one's own."""

from __future__ import annotations

import contextlib
import io
from contextvars import copy_context
from typing import ClassVar
from uuid import uuid4

from megatron_ds.log import get_logger
from megatron_ds.monitor.sinks import SINKS, SinkInfo
from megatron_ds.monitor.trackers.ids import known_id
from megatron_ds.monitor.trackers.tracker import Tracker
from megatron_ds.monitor.trackers.values import Line, name_of_run, nested_settings

PROJECT = "megatron-ds"


@SINKS.register("trackio")
class Trackio(Tracker):
    """Logger of a trackio run. Trackio finds the run that is resumed by its name, so each has a name of its own.

    Args:
        info: the run.
        project: name of the project.
        run_name: random characters are added; None = the name of the output directory.
        group: group of runs.
        space_id: a Hugging Face Space, `org/name`; None = `TRACKIO_SPACE_ID`, or the local database in `TRACKIO_DIR`.
        server_url: a server; None = `TRACKIO_SERVER_URL`, or none.
    """

    package: ClassVar[str | None] = "trackio"
    extra: ClassVar[str] = "trackio"
    secret: ClassVar[str] = "TRACKIO_WRITE_TOKEN"

    def __init__(
        self,
        info: SinkInfo,
        *,
        project: str = PROJECT,
        run_name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
    ) -> None:
        import trackio

        before = known_id(info)
        with contextlib.redirect_stdout(io.StringIO()):  # how to open the dashboard, in several lines
            self._run = copy_context().run(  # not the current run of this thread, which trackio finishes again at exit
                trackio.init,
                project,
                name=before or f"{name_of_run(info, run_name)}-{uuid4().hex[:6]}",
                group=group,
                space_id=space_id,
                server_url=server_url,
                config=nested_settings(info),
                resume="must" if before is not None else "never",
                embed=False,
                auto_log_gpu=False,  # the system metrics of our lines have the steps
                auto_log_cpu=False,
            )
        get_logger().info("%s: run %s; trackio show --project %s", info.entry, self._run.name, project)
        super().__init__(info, self._run.name)

    def log(self, line: Line) -> None:
        """Queue a row; trackio writes in a thread of its own and reports failures by warnings."""
        self._run.log(dict(line.values), step=line.step)

    def finish(self) -> None:
        """Write what is left."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
