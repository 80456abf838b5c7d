"""`report.html`: a run on one page, with its curves, data, settings, environment and resumptions.

The page is made of the files of a run's output alone, so it can be made again at any time, and of an unfinished run. It
contains all that it shows: it opens without a network, on light and on dark screens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np

from megatron_ds.atomic import replacing
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.errors import DataError
from megatron_ds.monitor.report.columns import Columns, read_columns
from megatron_ds.monitor.report.panels import draw_panels
from megatron_ds.monitor.report.sessions import Session, read_sessions
from megatron_ds.monitor.report.style import SCRIPT, STYLE
from megatron_ds.monitor.stragglers import RankTimes, StragglersReport
from megatron_ds.monitor.summary_text import format_duration
from megatron_ds.untrusted import read_complete_lines, read_record, read_text
from megatron_ds.untrusted.limits import RUN_FILE, RUN_LINE, RUN_RECORD
from megatron_ds.untrusted.records import Record

REPORT = "report.html"
MOST_RANKS = 32  # in the table of ranks


def write_report(output: Path, path: Path | None = None) -> Path:
    """Write the report of a run; an old one is replaced atomically.

    Args:
        output: the run's directory.
        path: the page; None = `report.html` in the output.

    Returns:
        the path of the page.

    Raises:
        DataError: there is no `metrics.jsonl`, or it is damaged.
    """
    columns = read_columns(output / "metrics.jsonl")
    path = path if path is not None else output / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page(output, columns), encoding="utf-8")
    return path


def page(output: Path, columns: Columns) -> str:
    """Return the page of a run.

    Args:
        output: the run's directory.
        columns: those of its `metrics.jsonl`.
    """
    sessions = read_sessions(output)
    config = _text(output / "config.yaml")
    resumed = [one.resumed_after for one in sessions if one.resumed_after is not None]
    charts = "".join(draw_panels(columns, resumed))
    sections = [
        f'<div class="tiles">{"".join(_tiles(columns, sessions, config))}</div>',
        f'<h2>Curves</h2><div class="charts">{charts}</div>' if charts else "<p>No step has been logged yet.</p>",
        _data(output / "data.json"),
        _table("Run", [*(sessions[-1].facts if sessions else []), *_saves(output / "checkpoints" / "saves.jsonl")]),
        _sessions(sessions),
        _ranks(output / "stragglers.json"),
        _table("Environment", list(sessions[-1].environment.items()) if sessions else []),
        f'<h2>Run file</h2><details class="card"><summary>config.yaml</summary><pre>{escape(config)}</pre></details>'
        if config
        else "",
    ]
    name = escape(output.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><main><h1>{name}</h1>{_status(output, sessions)}"
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _status(output: Path, sessions: Sequence[Session]) -> str:
    place = f" · {escape(str(output.resolve()))}"
    if not sessions:
        return f'<p class="sub">{place.removeprefix(" · ")}</p>'
    last = sessions[-1]
    if not last.outcome:
        text, kind = "no end is recorded: the run is still training, or was killed", ""
    else:
        text, kind = f"{last.outcome}, {_time(last.ended)}", last.outcome.split()[0]
    return f'<p class="sub"><span class="status {escape(kind)}">{escape(text)}</span>{place}</p>'


def _tiles(columns: Columns, sessions: Sequence[Session], config: str) -> Iterator[str]:
    """Yield the numbers at the top."""

    def tile(name: str, text: str) -> str:
        return f'<div class="tile"><span>{escape(name)}</span><b>{escape(text)}</b></div>'

    def finite(name: str) -> np.ndarray:
        values = columns[name].values if name in columns else np.empty(0)
        return values[np.isfinite(values)]

    if "train/loss" in columns:
        total = _num_steps(config)
        done = int(columns["train/loss"].steps[-1])
        yield tile("steps", f"{done:,}" + (f" of {total:,}" if total is not None and total != done else ""))
    if (loss := finite("train/loss")).size:
        yield tile("last training loss", f"{loss[-1]:.4f}")
    if (valid := finite("valid/loss")).size:
        yield tile("best validation loss", f"{valid.min():.4f}")
    if (speed := finite("train/tokens_per_s")).size:
        yield tile("median tokens/s", f"{np.median(speed):,.0f}")
    if (mfu := finite("train/mfu")).size:
        yield tile("median MFU", f"{np.median(mfu):.1%}")
    if (memory := finite("train/peak_memory_bytes")).size:
        yield tile("peak memory, first rank", f"{memory.max() / 1e9:.2f} GB")
    if (duration_s := sum(map(_duration_s, sessions))) > 0:
        yield tile("time", format_duration(duration_s))


def _num_steps(config: str) -> int | None:
    """Return the number of steps in the text of `config.yaml`; None = unknown."""
    content = parse_yaml(config, "config.yaml") if config else None
    train = content.get("train") if isinstance(content, dict) else None
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


class _SourceUsage(Record):
    name: str
    samples: int
    weight: float
    epochs: float


class _DataUsage(Record):
    sources: list[_SourceUsage]


class _Save(Record):
    bytes: int
    paused_s: float


def _data(path: Path) -> str:
    """Return the samples that each corpus gave."""
    if not path.is_file():
        return ""
    try:
        sources = read_record(path, _DataUsage, RUN_RECORD, DataError).sources
    except DataError:  # damaged by a crash: the rest of the page is whole
        return ""
    total, weights = sum(one.samples for one in sources) or 1, sum(one.weight for one in sources) or 1
    rows = "".join(
        f'<tr><td class="path">{escape(one.name)}</td><td class="n">{one.samples:,}</td>'
        f'<td class="n">{one.samples / total:.1%}</td><td class="n">{one.weight / weights:.1%}</td>'
        f'<td><span class="bar"><i style="width:{one.samples / total:.1%}"></i></span></td>'
        f'<td class="n">{one.epochs:.2f}</td></tr>'
        for one in sources
    )
    head = (
        '<tr><th>corpus</th><th class="n">samples</th><th class="n">share</th><th class="n">wanted</th><th></th>'
        '<th class="n">epochs</th></tr>'
    )
    return f'<h2>Data</h2><div class="card scroll"><table>{head}{rows}</table></div>'


def _saves(path: Path) -> list[tuple[str, str]]:
    """Return a row about the checkpoints; none without any."""
    saves, num_damaged = read_complete_lines(path, _Save, RUN_LINE, DataError) if path.is_file() else ([], 0)
    if not saves:
        return []
    size, paused_s = saves[-1].bytes / 1e9, sum(one.paused_s for one in saves)
    text = f"{len(saves)} saved, the last of {size:,.2f} GB; training paused {paused_s:,.1f} s for all"
    return [("checkpoints", f"{text}; {num_damaged} more lines of {path.name} are damaged" if num_damaged else text)]


def _ranks(path: Path) -> str:
    """Return a table of what ranks spend a step with, the slowest first."""
    if not path.is_file():
        return ""
    report = read_record(path, StragglersReport, RUN_RECORD, DataError)
    ranks = report.ranks
    medians = [float(np.median([getattr(one, name) for one in ranks])) for name in RankTimes._fields]
    ordered = sorted(ranks, key=lambda one: (-one.slow_in, -one.compute_s - one.data_s))[:MOST_RANKS]
    rows = "".join(
        f'<tr><td class="n">{one.rank}</td><td>{escape(one.host)}</td>'
        + "".join(f'<td class="n">{getattr(one, name):.4f}</td>' for name in RankTimes._fields)
        + f'<td class="n">{one.slow_in} of {report.windows}</td></tr>'
        for one in ordered
    )
    median = "".join(f'<td class="n">{value:.4f}</td>' for value in medians)
    head = (
        '<tr><th class="n">rank</th><th>host</th><th class="n">computing (s)</th><th class="n">waiting for others (s)'
        '</th><th class="n">waiting for data (s)</th><th class="n">slow in windows</th></tr>'
    )
    text = report.describe() or "no rank is slow"
    note = f'<p class="note">{escape(text)}; means of a step{_left_out(len(ranks))}</p>'
    return (
        f'<h2>Ranks</h2>{note}<div class="card scroll"><table>{head}{rows}<tr><td>median</td><td></td>{median}<td></td>'
        "</tr></table></div>"
    )


def _left_out(num_ranks: int) -> str:
    return f"; {num_ranks - MOST_RANKS} more ranks are in stragglers.json" if num_ranks > MOST_RANKS else ""


def _sessions(sessions: Sequence[Session]) -> str:
    rows = "".join(
        f"<tr><td>{escape(_time(one.started))}</td><td>{_beginning(one)}</td><td>{escape(_time(one.ended))}</td>"
        f'<td class="n">{format_duration(_duration_s(one)) if one.ended else ""}</td>'
        f"<td>{escape(one.outcome) or 'not recorded'}</td></tr>"
        for one in sessions
    )
    head = '<tr><th>started</th><th>at</th><th>ended</th><th class="n">time</th><th>outcome</th></tr>'
    return f'<h2>Starts and resumptions</h2><div class="card scroll"><table>{head}{rows}</table></div>' if rows else ""


def _beginning(session: Session) -> str:
    return "the first step" if session.resumed_after is None else f"resumed after step {session.resumed_after:,}"


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><td class="name">{escape(name)}</td><td>{escape(text)}</td></tr>' for name, text in rows)
    return f'<h2>{title}</h2><div class="card scroll"><table>{body}</table></div>' if body else ""


def _duration_s(session: Session) -> float:
    """Return how long a session has lasted; 0 if its end is not recorded, or a time is damaged."""
    try:
        return (datetime.fromisoformat(session.ended) - datetime.fromisoformat(session.started)).total_seconds()
    except (ValueError, TypeError):  # a TypeError: one of them has no time zone
        return 0.0


def _time(text: str) -> str:
    """Return an ISO 8601 time as `2026-01-31 12:34`."""
    return text[:16].replace("T", " ")


def _text(path: Path) -> str:
    return read_text(path, RUN_FILE, DataError) if path.is_file() else ""
