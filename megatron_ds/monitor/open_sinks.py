"""Check and open the sinks that a run file names under `monitor`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from megatron_ds.config import RunConfig, check_option_values
from megatron_ds.errors import ConfigError
from megatron_ds.monitor.sinks import SINKS, MetricSink, SinkInfo
from megatron_ds.monitor.trackers.ids import update_entries
from megatron_ds.monitor.trackers.tracker import Tracker, describe
from megatron_ds.registry import check_options


def check_sinks(run: RunConfig) -> None:
    """Check names and options of a run's sinks, and that the packages of the built-in ones are installed.

    Raises:
        ConfigError: a name is not registered, an option is unknown, missing, of another type or a secret, or a package
            is not installed.
    """
    for number, entry in enumerate(run.monitor):
        field = f"monitor[{number}]"
        sink = SINKS.get(entry.name, field)
        check_options(sink, 1, entry.options, field)
        if isinstance(sink, type) and issubclass(sink, Tracker):
            check_option_values(sink, entry.options, field)
            _check_no_secret(sink, entry.options, field)
            _check_installed(sink, f"{field}={entry.name}")


def _check_no_secret(tracker: type[Tracker], options: Mapping[str, Any], field: str) -> None:
    """Refuse addresses with a password or a token: the run file is sent to trackers, and the report shows it."""
    for name, value in options.items():
        address = urlsplit(value) if isinstance(value, str) and "://" in value else None
        if address is not None and (address.password is not None or "token" in address.query):
            raise ConfigError(
                f"{field}.{name} has a password or a token in its address, which config.yaml and report.html would "
                f"show; try {tracker.secret}"
            )


def _check_installed(tracker: type[Tracker], entry: str) -> None:
    if tracker.package is None:
        return
    found = find_spec(tracker.package)
    if found is None or found.origin is None:  # a directory of the package's name, such as wandb makes
        raise ConfigError(
            f"{entry} needs the package {tracker.package}, which is not installed; try pip install "
            f"'megatron-ds[{tracker.extra}]'"
        )


def open_sinks(info: SinkInfo) -> list[MetricSink]:
    """Return the sinks that the run file names. If one cannot be opened, those before it are closed.

    Raises:
        ConfigError: no sink of such a name is registered, or a tracker cannot be opened.
    """
    update_entries(info)
    opened: list[MetricSink] = []
    try:
        for number in range(len(info.run.monitor)):
            opened.append(_open(replace(info, number=number)))
    except Exception:
        for sink in opened:
            sink.close()
        raise
    return opened


def _open(info: SinkInfo) -> MetricSink:
    entry = info.run.monitor[info.number]
    sink = SINKS.get(entry.name, f"monitor[{info.number}]")
    try:
        return sink(info, **entry.options)
    except Exception as problem:  # a package raises anything; a sink from outside keeps its traceback
        if not isinstance(sink, type) or not issubclass(sink, Tracker) or isinstance(problem, ConfigError):
            raise
        raise ConfigError(
            f"{info.entry} cannot be opened ({describe(problem)}); change its options, or remove it"
        ) from problem
