"""The bounds of the assistant's turns among the pieces that a template writes between the texts of messages.

A turn begins after its header, which is what the template writes as the prompt for it (`add_generation_prompt`), and
ends with the control token that ends it. Each bound is found by rendering a part of the conversation, and is then known
for every turn between the same two pieces.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.data.chat.messages import ASSISTANT, USER, Message
from megatron_ds.data.chat.probe import Marked, Pieces, split_at_markers

_EMPTY_BLOCK = re.compile(r"\s*[<\[](\w+)[>\]]\s*[<\[]/\1[>\]]\s*\Z")
_MOST_KNOWN = 4096

Render = Callable[[Sequence[Message], bool], str | None]
"""Messages, and whether the prompt for the assistant follows -> their rendering; None = the template refuses them."""


@dataclass(frozen=True)
class Neighbours:
    """The text that a template writes before and after the texts of one turn.

    Attributes:
        turn: index of the message.
        first, last: the turn's first and last marker, as places in `pieces.markers`.
        pieces: rendering of the conversation with markers.
        marked: its messages.
    """

    turn: int
    first: int
    last: int
    pieces: Pieces
    marked: Marked

    @property
    def opening(self) -> str:
        """Text between the marker before the turn and its first."""
        return self.pieces.texts[self.first]

    @property
    def closing(self) -> str:
        """Text between the turn's last marker and the one after it."""
        return self.pieces.texts[self.last + 1]

    @property
    def marker_before(self) -> int | None:
        """The marker before the turn; None = it is the first."""
        return self.pieces.markers[self.first - 1] if self.first else None


@dataclass
class Known:
    """Bounds that were found before.

    Attributes:
        headers: length of the header in an opening.
        ends: length of the end in a closing, by the closing, and whether the conversation ends with it.
    """

    headers: dict[str, int | None] = field(default_factory=dict)
    ends: dict[tuple[str, bool], int | None] = field(default_factory=dict)


class TurnBounds:
    """Finds the header and the end of turns, of one template.

    Args:
        render: renders a conversation's messages.
        control_tokens: the tokenizer's, the longest first.
        known: results for pieces that were seen before; it is extended.

    Attributes:
        control_tokens: the tokenizer's, the longest first.
    """

    def __init__(self, render: Render, control_tokens: Sequence[str], known: Known) -> None:
        self._render, self._known, self.control_tokens = render, known, control_tokens
        pattern = "|".join(map(re.escape, control_tokens)) or "(?!)"
        self._control, self._control_run = re.compile(pattern), re.compile(f"(?:{pattern})+")

    def header_length(self, turn: Neighbours) -> int | None:
        """Return the number of characters of the opening that are not the turn's own; None if that is unknown."""
        known = self._known.headers
        if turn.opening not in known:
            _forget(known)
            known[turn.opening] = self._find_header(turn)
        return known[turn.opening]

    def end_length(self, turn: Neighbours) -> int | None:
        """Return the number of characters of the closing up to the end of the turn; None if no token ends it."""
        known, key = self._known.ends, (turn.closing, turn.turn == len(turn.marked.messages) - 1)
        if key not in known:
            _forget(known)
            known[key] = self._find_end(turn)
        return known[key]

    def _find_header(self, turn: Neighbours) -> int | None:
        """Compare the opening with that of the prompt, and with that of a message that has nothing but content."""
        before = turn.marked.messages[: turn.turn]
        prompt = self._after(self._render(before, True), turn.marker_before, turn)
        plain = self._plain_opening(turn)
        opening = turn.opening
        if not before and prompt is not None and not opening.startswith(prompt):
            # a system message of the template's own, which it does not write for a conversation without messages
            start = opening.rfind(prompt)
            prompt = opening[: start + len(prompt)] if start >= 0 else None
        if plain is not None and opening.startswith(plain) and _EMPTY_BLOCK.search(plain):
            return len(plain)  # with its empty block of reasoning, which is no part of the reply
        if prompt is None or self._lacks_header(prompt, plain, before, turn):
            return None if plain is None else common_length(opening, plain)
        if opening.startswith(prompt):
            return len(prompt)
        return common_length(opening, prompt if plain is None else prompt[: common_length(prompt, plain)])

    def _lacks_header(self, prompt: str, plain: str | None, before: Sequence[Message], turn: Neighbours) -> bool:
        """Return whether the template writes a header, or may write one, but no prompt."""
        if plain is not None and (not plain.startswith(prompt) or not plain[len(prompt) :].strip()):
            return False
        return self._after(self._render(before, False), turn.marker_before, turn) == prompt

    def _plain_opening(self, turn: Neighbours) -> str | None:
        messages: list[dict[str, Any]] = list(turn.marked.messages)
        messages[turn.turn] = _say(ASSISTANT, turn.marked.spare(), turn)
        before, marker, _ = (self._render(messages, False) or "").partition(turn.marked.spare())
        return self._after(before, turn.marker_before, turn) if marker else None

    def _find_end(self, turn: Neighbours) -> int | None:
        """Find the end token in what the template writes when the conversation ends with this turn."""
        messages, closing = turn.marked.messages, turn.closing
        tail: str | None = closing
        if turn.turn < len(messages) - 1:
            last = turn.pieces.markers[turn.last]
            tail = self._after(self._render(messages[: turn.turn + 1], False), last, turn)
        if tail is None or not (tokens := list(self._control.finditer(tail))):
            return None
        usual = self._usual_end(turn)
        place = tail.find(usual) if usual else -1
        end = place + len(usual) if usual and place >= 0 else tokens[-1].end()
        if closing.startswith(tail[:end]):
            return end
        token = self._control.search(closing)  # templates may end the last turn in a token of its own
        return token.end() if token else None

    def _usual_end(self, turn: Neighbours) -> str | None:
        """Return the token, or the tokens, that end a message that has nothing but content, last or not."""
        marker = turn.marked.spare()
        messages = [*turn.marked.messages[: turn.turn], _say(ASSISTANT, marker, turn)]
        followed = self._render([*messages, _say(USER, turn.marked.spare(1), turn)], False)
        tails = [(rendered or "").partition(marker)[2] for rendered in (self._render(messages, False), followed)]
        common = tails[0][: common_length(*tails)] if followed is not None else tails[0]
        tokens = self._control_run.search(common)
        return tokens[0] if tokens else None

    def _after(self, rendered: str | None, marker: int | None, turn: Neighbours) -> str | None:
        """Return the text after the last marker, if that is the expected one."""
        if rendered is None:
            return None
        pieces = split_at_markers(rendered, turn.marked.stem)
        return pieces.texts[-1] if (pieces.markers[-1] if pieces.markers else None) == marker else None


def find_turns(pieces: Pieces, marked: Marked) -> dict[int, list[Neighbours]]:
    """Return the place of each message's texts, by its index; without those that the template drops or scatters.

    A text may be repeated in the turn, or after it, as the name of a function before its result: there are then two
    places, without and with the repetition.
    """
    runs: dict[int, list[int]] = {}  # places of its markers
    for place, marker in enumerate(pieces.markers):
        runs.setdefault(marked.cores[marker].owner, []).append(place)
    found: dict[int, list[Neighbours]] = {}
    for turn, places in runs.items():
        run = [place for number, place in enumerate(places) if place == places[0] + number]
        markers = [pieces.markers[place] for place in places]
        single = [pieces.markers[place] for place in run]
        length = next((n for n in range(1, len(single)) if single[n] in single[:n]), len(single))
        if set(markers) <= set(single):
            lengths = sorted({length, len(run)}) if set(single) == set(single[:length]) else [len(run)]
            found[turn] = [Neighbours(turn, run[0], run[0] + size - 1, pieces, marked) for size in lengths]
    return found


def _say(role: str, text: str, like: Neighbours) -> dict[str, Any]:
    """Return a message that has nothing but content, in the form of the other messages' content."""
    in_parts = any(isinstance(message["content"], list) for message in like.marked.messages)
    return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def common_length(one: str, other: str) -> int:
    """Return the number of characters that both begin with."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _forget(known: dict[Any, Any]) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()
