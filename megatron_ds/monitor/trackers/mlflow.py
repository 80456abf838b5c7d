"""MLflow tracking: a server, a database or a directory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import ClassVar

from megatron_ds.log import get_logger
from megatron_ds.monitor.sinks import SINKS, SinkInfo
from megatron_ds.monitor.trackers.ids import known_id
from megatron_ds.monitor.trackers.tracker import Tracker
from megatron_ds.monitor.trackers.values import Line, flat_settings, name_of_run

MAX_PARAMS = 100  # of one request
MAX_PARAM_CHARACTERS = 6000
TRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_UNUSABLE = re.compile(r"[^\w\-. :/]")  # in names of metrics and parameters, such as of the patterns of groups


@SINKS.register("mlflow")
class MLflow(Tracker):
    """Logger of an MLflow run. The run file becomes its parameters, when it starts: MLflow never changes them.

    Args:
        info: the run.
        tracking_uri: place of the runs; None = `MLFLOW_TRACKING_URI`, or MLflow's default.
        experiment: its name, created if missing; None = `MLFLOW_EXPERIMENT_NAME`, or `Default`.
        run_name: None = the name of the output directory.
        tags: names and texts.
    """

    package: ClassVar[str | None] = "mlflow"
    extra: ClassVar[str] = "mlflow"
    secret: ClassVar[str] = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"

    def __init__(
        self,
        info: SinkInfo,
        *,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri)
        before = known_id(info)
        with _few_tries():
            if before is not None:
                self._client.update_run(before, status="RUNNING")
            self._id = before or self._start(info, experiment, name_of_run(info, run_name), tags)
        get_logger().info("%s: run %s, %s", info.entry, self._id, self._client.tracking_uri)
        super().__init__(info, self._id)

    def _start(self, info: SinkInfo, experiment: str | None, name: str, tags: Mapping[str, str] | None) -> str:
        from mlflow.entities import Param
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        title = experiment or MLFLOW_EXPERIMENT_NAME.get() or "Default"
        found = self._client.get_experiment_by_name(title)
        experiment_id = found.experiment_id if found is not None else self._client.create_experiment(title)
        run_id: str = self._client.create_run(experiment_id, run_name=name, tags=dict(tags or {})).info.run_id
        settings = iter(flat_settings(info).items())
        while part := [
            Param(_UNUSABLE.sub("_", key), str(value)[:MAX_PARAM_CHARACTERS])
            for key, value in islice(settings, MAX_PARAMS)
        ]:
            self._client.log_batch(run_id, params=part)
        return run_id

    def log(self, line: Line) -> None:
        """Log the numbers in one request."""
        from mlflow.entities import Metric

        now_ms, step = int(time.time() * 1000), line.step
        metrics = [Metric(_UNUSABLE.sub("_", name), value, now_ms, step) for name, value in line.values.items()]
        self._client.log_batch(self._id, metrics)

    def finish(self) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._id, "FAILED" if self.failed else "FINISHED")


@contextmanager
def _few_tries() -> Iterator[None]:
    """Have requests fail within seconds if the server is away, and not after four minutes, unless the user set it."""
    if TRIES in os.environ:
        yield
        return
    os.environ[TRIES] = "2"
    try:
        yield
    finally:
        del os.environ[TRIES]
