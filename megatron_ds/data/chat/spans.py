"""Spans of the assistant's turns in a rendering: as the template marks them, or else between its header and end."""

from bisect import bisect_left
from collections.abc import Sequence

from megatron_ds.data.chat.probe import Located
from megatron_ds.data.chat.template import Span, TemplateRefusal
from megatron_ds.data.chat.turns import TurnBounds, find_turns
from megatron_ds.data.chat.written import Written
from megatron_ds.errors import DataError


def unmarked_spans(written: Written, turns: Sequence[int], bounds: TurnBounds) -> list[Span]:
    """Return the span of each turn, from the end of its header to its end token.

    Args:
        written: the conversation, whose template marks no turns.
        turns: indices of messages of the assistant.
        bounds: finds headers and ends.

    Raises:
        DataError: a turn cannot be located exactly, or no control token ends it.
    """
    located, found = written.located, []
    places = find_turns(located.pieces, located.marked) if located is not None else {}
    for turn in turns:
        header = bounds.header_length(places[turn][0]) if turn in places else None
        if located is None or header is None:
            raise DataError(_not_found(written, turn))
        ends = [(place, end) for place in places[turn] if (end := bounds.end_length(place)) is not None]
        if not ends:
            raise DataError(_no_end(written, places[turn][0].closing, bounds.control_tokens))
        place, end = ends[0]
        start, stop = located.spans[place.first][0], located.spans[place.last][1]
        found.append((start - len(place.opening) + header, stop + end))
    return found


def marked_spans(written: Written, turns: Sequence[int], control_tokens: tuple[str, ...]) -> list[Span]:
    """Return the spans that the template marks as turns of the assistant, each with its end token; a turn may have
    several.

    Args:
        written: the conversation.
        turns: indices of messages of the assistant.
        control_tokens: of the tokenizer, the longest first.

    Raises:
        DataError: a turn has no mark, or no control token ends it.
    """
    own = written.conversation.turns
    by_turn = _marks_by_turn(own, written.marks, written.located)
    if by_turn is None:
        raise DataError(
            f"{written.subject} marks {len(written.marks)} turns with {{% generation %}}, and the assistant has "
            f"{len(own)}; mend the template"
        )
    found = []
    for turn in turns:
        *first, (start, end) = by_turn[turn]
        begin = first[0][0] if first else start
        if not written.text[begin:end].rstrip().endswith(control_tokens):
            end = _end_after_mark(written, turn, end, control_tokens)
        found += [*first, (start, end)]
    return found


def _end_after_mark(written: Written, turn: int, end: int, control_tokens: Sequence[str]) -> int:
    """Return the end of the control token that ends a marked turn, where its mark lacks it.

    The token must also follow when the conversation ends with the turn: else it begins the next message.
    """
    text = written.text
    after = end + len(text[end:]) - len(text[end:].lstrip())
    token = next((token for token in control_tokens if text.startswith(token, after)), None)
    if token is not None:
        try:
            alone, marks = written.template.render(written.messages[: turn + 1], written.conversation.tools, mask=True)
        except TemplateRefusal:  # a template may refuse the first messages alone
            alone, marks = text, [(0, end)]
        if marks and alone[marks[-1][1] :].lstrip().startswith(token):
            return after + len(token)
    raise DataError(_no_end(written, text[end:], control_tokens))


def _marks_by_turn(
    turns: Sequence[int], marks: Sequence[Span], located: Located | None
) -> dict[int, list[Span]] | None:
    """Return the marked spans of each turn; None if a turn has none, or a mark belongs to no turn."""
    starts = [start for start, _ in located.spans] if located is not None else []
    owners = [located.marked.cores[marker].owner for marker in located.pieces.markers] if located is not None else []
    firsts = [bisect_left(starts, start) for start, _ in marks]
    inside = [owners[n] if n < len(starts) and starts[n] < end else None for n, (_, end) in zip(firsts, marks)]
    if len(marks) == len(turns) and all(owner in (None, turn) for owner, turn in zip(inside, turns)):
        return {turn: [mark] for turn, mark in zip(turns, marks)}
    found: dict[int, list[Span]] = {turn: [] for turn in turns}
    for mark, first, owner in zip(marks, firsts, inside):
        # a mark without a text of a message, such as a token after the turn, belongs to the text before it
        turn = owner if owner is not None else owners[first - 1] if 0 < first <= len(owners) else None
        if turn not in found:
            return None
        found[turn].append(mark)
    return found if all(found.values()) else None


def _not_found(written: Written, turn: int) -> str:
    message = written.conversation.messages[turn]
    if written.located is not None and not message["content"].strip():
        given = ", ".join(key for key in message if key not in ("role", "content"))
        return (
            f"{written.subject} writes nothing of message {turn}, which holds {given}; use a template that writes it, "
            "or switch off its loss with weight: 0"
        )
    return (
        f"{written.subject} changes the assistant's messages, so that they cannot be found in the text; mark them with "
        "{% generation %} in the template"
    )


def _no_end(written: Written, found: str, control_tokens: Sequence[str]) -> str:
    following = next((token for token in control_tokens if found.lstrip().startswith(token)), None)
    end = f"{found[:12]!r}, which is no control token" if following is None else f"nothing before {following!r}"
    return (
        f"{written.subject} ends the assistant's turn with {end}: the trained model would not know when to stop; let "
        "the template end the turn with eos_token"
    )
