"""Timetables of pipelines, and runs with failures, drawn as text for a terminal.

Each rank is a row and time runs to the right. A pass is as wide as it is long, begins with the number of its
micro-batch where that fits, and is light if forward and dark if backward. Of a long step only its begin and its end are
drawn, where the pipeline fills and drains, at a scale at which every pass can be seen. A pipeline that is too deep for
this is drawn as a whole, by what each rank does most of the time in a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ds.planner.failures.goodput import Span
from megatron_ds.planner.pipeline.timetable import Event, Timetable
from megatron_ds.planner.plan_values import percent

NARROWEST, MOST_RANKS = 40, 16
FILLS: dict[str, tuple[str, str]] = {"forward": ("─", "═"), "backward": ("▒", "▓")}
"""Characters of passes through chunks with even and with odd numbers."""
TITLES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "interleaved 1F1B", "deepspeed": "1F1B of DeepSpeed"}
WAITS, GAP, MORE_RANKS = "·", " ⋯ ", "⋮"
RUN_FILLS = {"useful": "█", "lost": "░", "restart": "r", "detection": "!", "waiting": "w"}
RUN_NAMES = {
    "useful": "training",
    "lost": "lost training",
    "restart": "restart",
    "detection": "not yet noticed",
    "waiting": "waiting for a node",
}
_ASCII = str.maketrans(
    {"─": "-", "═": "=", "▒": "#", "▓": "%", "·": ".", "⋯": "~", "⋮": ":", "▕": "|", "▏": "|", "█": "#", "░": "x"}
)


def draw_timetable(timetable: Timetable, width: int, *, unicode: bool = True, most_ranks: int = MOST_RANKS) -> str:
    """Return the drawing of a timetable, at most `width` characters wide, with a title, an axis and a legend.

    Args:
        timetable: of a step.
        width: columns of the terminal; 40 if it has fewer.
        unicode: False = ASCII characters only.
        most_ranks: ranks that are drawn; of more, the first and the last ones.
    """
    ranks = _shown_ranks(timetable.num_ranks, most_ranks)
    margin = len(f"rank {timetable.num_ranks - 1} ")
    columns = max(width, NARROWEST) - margin - len("▕▏ 27 %")
    pieces = _pieces(timetable, columns)
    lines = [_title(timetable)]
    by_rank: dict[int, list[Event]] = {rank: [] for rank in ranks if rank is not None}
    for event in timetable.events:
        if event.rank in by_rank:
            by_rank[event.rank].append(event)
    for rank in ranks:
        if rank is None:
            lines.append(MORE_RANKS.rjust(margin - 1))
            continue
        row = GAP.join(_row(by_rank[rank], piece) for piece in pieces)
        idle = timetable.bubble_s[rank] / timetable.duration_s if timetable.duration_s else 0.0
        lines.append(f"{f'rank {rank}'.ljust(margin)}▕{row}▏{percent(idle):>5}")
    lines.append(" " * (margin + 1) + GAP.replace("⋯", " ").join(_axis(piece) for piece in pieces))
    lines += _legend(timetable, pieces, max(width, NARROWEST))
    text = "\n".join(line.rstrip() for line in lines)
    return text if unicode else text.translate(_ASCII)


def draw_run(spans: Sequence[Span], width: int, *, hours: float = 24.0, unicode: bool = True) -> str:
    """Return the drawing of the first hours of a run with failures, at most `width` characters wide, with a legend."""
    columns = max(width, NARROWEST) - 2
    piece = _Piece(0.0, hours * 3600, columns)
    cells = [" "] * columns
    for span in spans:
        # A short event has a column nonetheless, which it takes from the training before it.
        first = round(piece.place(span.start_s))
        last = max(round(piece.place(span.end_s)), first + 1)
        for column in range(first, min(last, columns)):
            if span.use != "useful" or cells[column] == " ":
                cells[column] = RUN_FILLS[span.use]
    axis = f"0 h{f'{hours:g} h'.rjust(columns - 3)}"
    parts = [f"{fill} {RUN_NAMES[use]}" for use, fill in RUN_FILLS.items() if fill in cells]
    text = "\n".join([f"▕{''.join(cells)}▏", f" {axis}", *_wrap(parts, columns + 2)])
    return text if unicode else text.translate(_ASCII)


@dataclass(frozen=True)
class _Piece:
    """Part of a step that is drawn in a number of columns; `coarse`: its passes are narrower than a column."""

    start_s: float
    end_s: float
    columns: int
    coarse: bool = False

    def place(self, at_s: float) -> float:
        """Return where a moment lies, between 0 and `columns`."""
        share = (at_s - self.start_s) / (self.end_s - self.start_s) if self.end_s > self.start_s else 0.0
        return min(max(share, 0.0), 1.0) * self.columns


def _pieces(timetable: Timetable, columns: int) -> list[_Piece]:
    """Return the complete step if its passes are wide enough, otherwise its begin and its end if the filling fits."""
    lengths = timetable.ends_s - timetable.starts_s
    shortest, longest = float(lengths.min()), float(lengths.max())
    shortest = max(shortest, longest / 8)  # a tiny stage does not set the scale
    if shortest <= 0 or timetable.duration_s <= columns * shortest:
        return [_Piece(0.0, timetable.duration_s, columns)]
    half = (columns - len(GAP)) // 2
    filling = float(timetable.starts_s[1, :: timetable.num_ranks].min())  # until rank 0 goes back first
    if filling > half * shortest:
        return [_Piece(0.0, timetable.duration_s, columns, coarse=True)]
    of_column = shortest / (2 if 2 * filling <= half * shortest else 1)
    rest = columns - len(GAP) - half
    end_s = timetable.duration_s
    return [_Piece(0.0, half * of_column, half), _Piece(end_s - rest * of_column, end_s, rest)]


def _row(events: Sequence[Event], piece: _Piece) -> str:
    return _coarse_row(events, piece) if piece.coarse else _fine_row(events, piece)


def _fine_row(events: Sequence[Event], piece: _Piece) -> str:
    cells = [WAITS] * piece.columns
    for event in events:
        if event.end_s <= piece.start_s or event.start_s >= piece.end_s:
            continue
        begin, end = piece.place(event.start_s), piece.place(event.end_s)
        first, last = round(begin), round(end)
        label = str(event.micro_batch)
        fits = len(label) + 0.75 <= end - begin and len(label) < last - first and event.start_s >= piece.start_s
        cells[first:last] = (label if fits else "").ljust(last - first, _fill(event))
    return "".join(cells)


def _coarse_row(events: Sequence[Event], piece: _Piece) -> str:
    """Draw in each column the kind of pass with the largest share of its time, or waiting if that is more than half."""
    shares = [dict.fromkeys(FILLS, 0.0) for _ in range(piece.columns)]
    for event in events:
        first, last = piece.place(event.start_s), piece.place(event.end_s)
        for column in range(int(first), min(math.ceil(last), piece.columns)):
            shares[column][event.kind] += min(last, column + 1) - max(first, column)
    return "".join(
        FILLS[max(share, key=lambda kind: share[kind])][0] if sum(share.values()) >= 0.5 else WAITS for share in shares
    )


def _fill(event: Event) -> str:
    return FILLS[event.kind][event.chunk % 2]


def _shown_ranks(num_ranks: int, most: int) -> list[int | None]:
    """Return the ranks to draw, and None where some are left out."""
    if num_ranks <= most:
        return list(range(num_ranks))
    first = (most + 1) // 2
    return [*range(first), None, *range(num_ranks - (most - first), num_ranks)]


def _title(timetable: Timetable) -> str:
    chunks = f" x {timetable.num_chunks} chunks" if timetable.num_chunks > 1 else ""
    count = timetable.num_micro_batches
    return (
        f"{TITLES[timetable.schedule]}: {timetable.num_ranks} ranks{chunks}, {count} micro-batch{'es' * (count > 1)}, "
        f"{_seconds(timetable.duration_s)}, {percent(timetable.bubble_share, 1)} waiting"
    )


def _axis(piece: _Piece) -> str:
    begin, end = _seconds(piece.start_s), _seconds(piece.end_s)
    return begin + end.rjust(piece.columns - len(begin)) if len(begin) + len(end) < piece.columns else begin


def _legend(timetable: Timetable, pieces: Sequence[_Piece], width: int) -> list[str]:
    example = min(2, timetable.num_micro_batches - 1)
    number = "" if pieces[0].coarse else str(example)
    of_number = "" if pieces[0].coarse else f" of micro-batch {example}"
    parts = [f"{number}{light} forward{of_number}, {number}{dark} backward" for light, dark in [_fills(0)]]
    if timetable.num_chunks > 1 and not pieces[0].coarse:
        parts += ["{}{} through chunks 1, 3, ...".format(*_fills(1))]
    parts.append(f"{WAITS} waiting{' or sending' * any(timetable.message_s)} (right: % waiting)")
    if len(pieces) > 1:
        parts.append(f"{GAP.strip()} {_seconds(pieces[1].start_s - pieces[0].end_s)} not drawn")
    return _wrap(parts, width)


def _fills(chunk: int) -> tuple[str, str]:
    return FILLS["forward"][chunk % 2], FILLS["backward"][chunk % 2]


def _wrap(parts: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for part in parts:
        line = f"{lines[-1]}   {part}" if lines[-1] else part
        if len(line) > width and lines[-1]:
            lines.append(part)
        else:
            lines[-1] = line
    return lines


def _seconds(value: float) -> str:
    """Format seconds with three digits, in the unit that suits."""
    factor, unit = (1.0, "s") if value >= 1 or value <= 0 else (1e3, "ms") if value >= 1e-3 else (1e6, "us")
    scaled = value * factor
    digits = max(0, 2 - math.floor(math.log10(scaled))) if scaled > 0 else 0
    return f"{scaled:.{digits}f} {unit}"
